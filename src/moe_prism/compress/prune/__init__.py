"""Remove whole experts: criteria that rank them, the choice under a budget, mask mode and physical removal."""

from ...registry import Registry
from .base import Criterion, LayerSubject
from .choose import KeptExperts, PruneRequest, choose
from .mask import pruned
from .protect import Protection

__all__ = ["Criterion", "KeptExperts", "LayerSubject", "PruneRequest", "choose", "criteria", "protections", "pruned"]

criteria: Registry[type[Criterion]] = Registry(
    "prune criterion",
    {
        "random": ("moe_prism.compress.prune.random_:RandomDraw", "a uniform draw, by --seed"),
        "odd": ("moe_prism.compress.prune.position:Odd", "experts with odd ids, counted from 0"),
        "even": ("moe_prism.compress.prune.position:Even", "experts with even ids, counted from 0"),
        "first-half": ("moe_prism.compress.prune.position:FirstHalf", "the lower ids"),
        "last-half": ("moe_prism.compress.prune.position:LastHalf", "the higher ids"),
        "hard-count": ("moe_prism.compress.prune.count:HardCount", "how often an expert is chosen (SEER-MoE)"),
        "soft-count": ("moe_prism.compress.prune.count:SoftCount", "router probability over all tokens (SEER-MoE)"),
        "soft-selected": ("moe_prism.compress.prune.count:SoftSelected", "routing weight over the tokens that chose the expert"),
        "gate-norm": ("moe_prism.compress.prune.norm:GateNorm", "mean routing weight x output norm over routed tokens (REAP)"),
        "activation-norm": ("moe_prism.compress.prune.norm:ActivationNorm", "mean output norm over routed tokens (MAN)"),
        "easy-ep": ("moe_prism.compress.prune.norm:EasyEp", "routing weight x output norm x how far the layer turns the token"),
        "output-error": (
            "moe_prism.compress.prune.output_error:OutputError",
            "greedy removal by the layer's output error with tokens routed again",
        ),
        "energy": ("moe_prism.compress.prune.norm:Energy", "sum of squared routing weight x output norm"),
    },
)

protections: Registry[Protection] = Registry(
    "protection", {"super-experts": ("moe_prism.compress.prune.protect:super_experts", "experts with outlier outputs (O-07)")}
)

"""Remove whole experts: the contract of criteria that rank them, the choice under a budget, mask mode and physical removal."""

from ...catalogue import methods
from ...registry import Registry, View
from .base import Criterion, LayerSubject
from .choose import KeptExperts, PruneRequest, choose
from .mask import pruned
from .protect import Protection

__all__ = ["Criterion", "KeptExperts", "LayerSubject", "PruneRequest", "choose", "criteria", "protections", "pruned"]

criteria: View[type[Criterion]] = methods.only("weights", "prune criterion", "moe_prism.methods.prune.")

protections: Registry[Protection] = Registry(
    "protection",
    {"super-experts": ("moe_prism.compress.prune.protect:super_experts", "experts with outlier outputs", "arXiv 2507.23279")},
)

"""Routing stages: what is made of the router's choice before slots are selected."""

from ..registry import Registry
from .base import Routed, Stage, VariantIndex

__all__ = ["Routed", "Stage", "VariantIndex", "routing_stages", "stage_class"]

routing_stages: Registry[type[Stage]] = Registry(
    "routing stage",
    {
        "top-n": ("moe_prism.routing.top_n:TopN", "a layer's best n experts of every token"),
        "token-threshold": (
            "moe_prism.routing.token_threshold:TokenThreshold",
            "experts whose weight reaches a share of the token's largest (SER, NAEE)",
        ),
        "rank": (
            "moe_prism.routing.rank:Rank",
            "the expert of one routing rank alone (the weak routing of SCMoE)",
            "arXiv 2405.14507",
        ),
        "score-mass": (
            "moe_prism.routing.score_mass:ScoreMass",
            "the fewest experts that hold a share of the token's routing weight (for sigmoid routers too)",
        ),
        "weight-cutoff": (
            "moe_prism.routing.weight_cutoff:WeightCutoff",
            "experts whose weight reaches the layer's cutoff: n per token on average over the calibration text",
        ),
        "batch-redistribution": (
            "moe_prism.routing.batch:BatchRedistribution",
            "n experts per token on average over the batch, spent on its largest weights (Alloc-MoE)",
            "arXiv 2604.08133",
        ),
    },
)
"""Stages that several methods share. A method with a stage of its own needs no line here: its stage has the method's name."""


def stage_class(name: str) -> type[Stage]:
    """The stage of a name: one of `routing_stages`, or that of the method of the same name. UsageError for any other."""
    from ..catalogue import methods

    if name not in routing_stages.names() and name in methods.names("routing"):
        own: type[Stage] | None = getattr(methods.get(name), "stage", None)
        if own is not None:
            return own
    return routing_stages.get(name)

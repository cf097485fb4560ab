"""Skipping whole experts at run time: plans per layer, rules per token, and what they do to the router's choice."""

from ..registry import Registry
from .base import PlanIndex, RoutingPolicy
from .plan import SkipPlan

__all__ = ["PlanIndex", "RoutingPolicy", "SkipPlan", "routing_policies"]

routing_policies: Registry[type[RoutingPolicy]] = Registry(
    "routing policy",
    {
        "top-n": ("moe_prism.routing.top_n:TopN", "a layer's best n experts of every token"),
        "token-threshold": (
            "moe_prism.routing.token_threshold:TokenThreshold",
            "experts whose weight reaches a share of the token's largest (SER, NAEE)",
        ),
        "score-mass": (
            "moe_prism.routing.score_mass:ScoreMass",
            "the fewest experts that hold a share of the token's routing weight (for sigmoid routers too)",
        ),
        "weight-level": (
            "moe_prism.routing.weight_level:WeightLevel",
            "experts whose weight reaches the layer's level: n per token on average over the calibration text",
        ),
        "batch-redistribution": (
            "moe_prism.routing.batch:BatchRedistribution",
            "n experts per token on average over the batch, spent on its largest weights (Alloc-MoE)",
        ),
    },
)

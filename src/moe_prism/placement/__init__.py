"""Which device holds which expert, or which of its blocks: policies, one file each, and what a placement costs on a trace."""

from ..registry import Registry
from .base import Cluster, Demand, ExpertPlacement, Policy
from .demand import demand_of, mixed
from .simulate import PlacementCost, simulate

__all__ = ["Cluster", "Demand", "ExpertPlacement", "PlacementCost", "Policy", "demand_of", "mixed", "placements", "simulate"]

placements: Registry[Policy] = Registry(
    "placement",
    {
        "contiguous": ("moe_prism.placement.contiguous:contiguous", "experts in the order of their numbers: an engine's default"),
        "eplb": (
            "moe_prism.placement.eplb:eplb",
            "the most loaded experts get replicas, then the heaviest first to the lightest device",
        ),
        "moetuner": (
            "moe_prism.placement.moetuner:moetuner",
            "the same replicas; devices of even load by an integer program, then few tokens between devices of neighbouring layers",
            "arXiv 2502.06643",
        ),
        "hot-blocks": (
            "moe_prism.placement.hot_blocks:hot_blocks",
            "every expert whole on a device, spare memory for replicas of the most loaded blocks (ours)",
        ),
        "even-blocks": (
            "moe_prism.placement.hot_blocks:even_blocks",
            "blocks placed as eplb places experts: most even, most traffic",
        ),
    },
)

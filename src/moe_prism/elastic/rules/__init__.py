"""Selection rules: which candidate slots are kept."""

from ...registry import Registry
from ..base import Rule

rules: Registry[type[Rule]] = Registry(
    "rule",
    {
        "product": (
            "moe_prism.elastic.rules.top_slots:TopSlots",
            "best K slots of a token by routing weight x predicted output norm (default for a count)",
        ),
        "threshold": (
            "moe_prism.elastic.rules.threshold:Threshold",
            "every slot whose value passes a calibrated level: a continuous dial (default for a budget)",
        ),
        "plan": (
            "moe_prism.elastic.rules.layer_budgets:LayerBudgets",
            "the product rule with budgets per layer, allocated from each layer's profile",
        ),
        "mass": ("moe_prism.elastic.rules.mass:Mass", "slots until they cover a share of the token's estimated output"),
        "pattern": (
            "moe_prism.elastic.rules.pattern:Pattern",
            "the paper's code: a fixed number of sub-experts per routing rank",
        ),
        "linear": (
            "moe_prism.elastic.rules.whole_experts:WholeExperts",
            "the paper's linear gate without training: whole experts by rank, ties by order",
        ),
    },
)

"""Sub-expert selection and execution: scorers, rules, and the runtime that installs them on a model."""

from ..registry import Registry
from .base import LayerPlan, Rule, Scorer, Slots
from .compensate import compensators
from .runtime import Elastic, attach, operating_point

__all__ = ["Elastic", "LayerPlan", "Rule", "Scorer", "Slots", "attach", "compensators", "operating_point", "rules", "scorers"]

rules: Registry[type[Rule]] = Registry(
    "rule",
    {
        "product": (
            "moe_prism.elastic.product:Product",
            "best K slots of a token by routing weight x predicted output norm (default for a count)",
        ),
        "threshold": (
            "moe_prism.elastic.threshold:Threshold",
            "every slot whose value passes a calibrated level: a continuous dial (default for a budget)",
        ),
        "plan": (
            "moe_prism.elastic.plan_:Plan",
            "the product rule with budgets per layer, allocated from each layer's profile",
        ),
        "mass": ("moe_prism.elastic.mass:Mass", "slots until they cover a share of the token's estimated output"),
        "pattern": ("moe_prism.elastic.pattern:Pattern", "the paper's code: a fixed number of sub-experts per routing rank"),
        "linear": (
            "moe_prism.elastic.linear:Linear",
            "the paper's linear gate without training: whole experts by rank, ties by order",
        ),
    },
)

scorers: Registry[type[Scorer]] = Registry(
    "scorer",
    {
        "ridge": (
            "moe_prism.elastic.ridge:Ridge",
            "output norms predicted from input and gate neurons, fitted in closed form (default)",
        ),
        "low-rank": (
            "moe_prism.elastic.low_rank:LowRank",
            "the same from a few shared projections of the input: fewer weights per expert, less exact; fitted on request",
        ),
        "gates": ("moe_prism.elastic.gate_scores:GateScores", "the paper's proxy: mean |activation| of the gate neurons"),
        "oracle": ("moe_prism.elastic.oracle:Oracle", "true output norms: costs the full layer, for analysis only"),
    },
)

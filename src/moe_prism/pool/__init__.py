"""Whole models as experts: which of several models answers a question, and at which quality level. Plain data in, plain data out."""

from ..registry import Registry
from .base import Chooser, ModelOption, Record, SubsetLimits

__all__ = ["Chooser", "ModelOption", "Record", "SubsetLimits", "choosers"]

choosers: Registry[type[Chooser]] = Registry(
    "chooser",
    {
        "cheapest": (
            "moe_prism.pool.cheapest:Cheapest",
            "the cheapest of what meets a request's limits; needs no record (default)",
        ),
        "moe2": (
            "moe_prism.pool.moe2:MoE2",
            "a subset of the models under limits on time and energy, then the best one for each question (MoE²)",
            "arXiv 2501.09410",
        ),
        "symbolic": (
            "moe_prism.pool.symbolic:Symbolic",
            "models by the skills that a question needs, questions grouped by model (Symbolic-MoE)",
            "arXiv 2503.05641",
        ),
        "rocket": (
            "moe_prism.pool.rocket:Rocket",
            "a few models or adapters that are good, consistent and unlike each other, and a gate over them (Rocket)",
            "arXiv 2408.15915",
        ),
    },
)

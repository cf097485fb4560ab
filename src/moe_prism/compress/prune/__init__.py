"""Remove whole experts: the contract of criteria that rank them, the choice under a budget, mask mode and physical removal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...catalogue import methods
from ...lazy import on_use
from ...registry import Registry, View

if TYPE_CHECKING:
    from .base import Criterion, LayerSubject
    from .choice import KeptExperts, PruneRequest, choose
    from .mask import pruned
    from .protect import Protection

__getattr__ = on_use(
    __name__,
    {
        "base": "Criterion LayerSubject",
        "choice": "KeptExperts PruneRequest choose",
        "mask": "pruned",
        "protect": "Protection",
    },
)

__all__ = ["Criterion", "KeptExperts", "LayerSubject", "PruneRequest", "choose", "criteria", "protections", "pruned"]

criteria: View[type[Criterion]] = methods.only("weights", "prune criterion", "moe_prism.methods.prune.")

protections: Registry[Protection] = Registry(
    "protection",
    {"super-experts": ("moe_prism.compress.prune.protect:super_experts", "experts with outlier outputs", "arXiv 2507.23279")},
)

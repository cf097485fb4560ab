"""Architectures that `moe-prism train` builds: how many experts run, how they are chosen, and what training adds to the loss.

Importing `moe_prism.architectures.own` makes transformers know the ones that are ours, so that it loads their checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use
from ..registry import Registry

if TYPE_CHECKING:
    from .base import Architecture, Part, Place, Routing, Seen

__getattr__ = on_use(__name__, {"base": "Architecture Part Place Routing Seen"})

__all__ = ["Architecture", "Part", "Place", "Routing", "Seen", "architectures"]

architectures: Registry[type[Architecture]] = Registry(
    "architecture",
    {
        "top-k": ("moe_prism.architectures.top_k:TopK", "a learned router and a fixed k: what the others are compared with"),
        "smoe-dropout": (
            "moe_prism.architectures.smoe_dropout:SMoEDropout",
            "a router that is never trained, and a k that grows (SMoE-Dropout)",
            "arXiv 2303.01610",
        ),
        "elastic": ("moe_prism.architectures.elastic:Elastic", "trained at a budget of sub-experts that is drawn per token"),
    },
)

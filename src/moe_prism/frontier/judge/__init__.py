"""A judge that perplexity cannot fool: slices of held-out text, each scored against the full model (LLM-KICK, arXiv 2310.01382)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import on_use
from ...registry import Registry

if TYPE_CHECKING:
    from .base import Slice

__getattr__ = on_use(__name__, {"base": "Material Slice"})

__all__ = ["ALL", "slices"]

ALL = "all"

slices: Registry[type[Slice]] = Registry(
    "slice",
    {
        "cloze": (
            "moe_prism.frontier.judge.cloze:Cloze",
            "words of the text that 24 tokens before them do not hold: closed book",
        ),
        "copy": ("moe_prism.frontier.judge.copied:Copy", "the rest of a random key that stands 40 tokens before"),
        "rare": ("moe_prism.frontier.judge.rare:Rare", "the rarest tenth of the text's tokens"),
        "syntax": (
            "moe_prism.frontier.judge.syntax:Syntax",
            "Python functions continued by 64 greedy tokens: do they still parse",
        ),
        "continuation": ("moe_prism.frontier.judge.continuation:Continuation", "64 greedy tokens, all equal to the full model's"),
        "routing": (
            "moe_prism.frontier.judge.routing:RoutingAgreement",
            "the experts that routers choose: Jaccard index with the full model's",
        ),
    },
)
"""Slice name -> class, see `Slice`."""

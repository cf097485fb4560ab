"""Which neurons of a dense layer become which expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import on_use
from ...registry import Registry

if TYPE_CHECKING:
    from .base import SplitMethod

__getattr__ = on_use(__name__, {"base": "SplitMethod"})

__all__ = ["splits"]

splits: Registry[type[SplitMethod]] = Registry(
    "split",
    {
        "importance": (
            "moe_prism.methods.split.importance:ByImportance",
            "the strongest neurons always run, the rest is dealt so that experts are equally strong",
            "arXiv 2512.02351",
        ),
        "read-me": (
            "moe_prism.methods.split.read_me:ReadMe",
            "neurons that are strong in every domain always run, the others go to experts of the domain they are strongest in",
            "arXiv 2410.19123",
        ),
        "equal": (
            "moe_prism.methods.split.equal:Equal",
            "neighbouring neurons in equal slices, without a look at any text",
            "arXiv 2503.02495",
        ),
        "random": ("moe_prism.methods.split.random_deal:RandomDeal", "a draw, to compare with"),
    },
)
"""Name -> class, see `SplitMethod`."""

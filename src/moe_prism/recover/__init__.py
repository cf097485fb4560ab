"""Win back quality below full budget from calibration text, in tensors beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use
from ..registry import Registry

if TYPE_CHECKING:
    from .base import Method, RecoverJob

__getattr__ = on_use(__name__, {"base": "Method RecoverJob"})

__all__ = ["Method", "RecoverJob", "methods"]

methods: Registry[Method] = Registry(
    "recovery",
    {
        "repair": (
            "moe_prism.recover.run:repair",
            "W_down of experts that dropped blocks, by least squares; more resident bytes",
        ),
        "predictor": ("moe_prism.recover.predictor:train", "the predictor, trained to choose slots by KL; no more bytes"),
        "router": (
            "moe_prism.recover.router:train",
            "the router of a resliced checkpoint, at K that rises or is drawn; another model",
            "arXiv 2510.19366",
        ),
    },
)

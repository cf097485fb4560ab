"""Win back quality below full budget from calibration text, in tensors beside the weights."""

from ..registry import Registry
from .base import Method, RecoverJob

__all__ = ["Method", "RecoverJob", "methods"]

methods: Registry[Method] = Registry(
    "recovery",
    {
        "repair": (
            "moe_prism.recover.run:repair",
            "W_down of experts that dropped blocks, by least squares; more resident bytes",
        ),
        "predictor": ("moe_prism.recover.predictor:train", "the predictor, trained to choose slots by KL; no more bytes"),
    },
)

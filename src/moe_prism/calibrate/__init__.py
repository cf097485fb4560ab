"""One streaming pass over calibration text; collectors are plug-ins."""

from ..registry import Registry
from .base import Collector, Routed

collectors: Registry[type[Collector]] = Registry(
    "collector",
    {
        "counts": ("moe_prism.calibrate.counts:Counts", "tokens and routing weight per expert"),
        "tokens": ("moe_prism.calibrate.tokens:TokenReservoir", "a bounded uniform sample of each expert's inputs"),
    },
)

__all__ = ["Collector", "Routed", "collectors"]

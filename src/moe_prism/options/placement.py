"""What a placement of experts is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Options):
    """Where experts shall lie, and what they are served with.

    >>> import moe_prism
    >>> moe_prism.PlaceOptions(devices=0).check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --devices 0 is too small; give at least 1
    """

    devices: int = option(8, "Devices that share the experts.", least=1)
    policy: str = option("moetuner", "Who goes where; see `moe-prism ls placements`.", names="moe_prism.placement:placements")
    spare: int = option(0, "Slots of a whole expert for replicas, in every layer, over all devices.", least=0)
    nodes: int = option(1, "Machines that the devices are on.", least=1)
    link: float = option(1.0, "How many times faster devices of one machine reach each other.", least=1)
    full_share: float = option(
        0.0, "Share of the requests at full budget; the others keep the slots that the trace was recorded with.", least=0, most=1
    )
    batch: int = option(32, "Requests that are decoded together when the placement is replayed.", least=1)

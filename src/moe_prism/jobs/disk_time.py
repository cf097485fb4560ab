"""How long a disk takes for layers whose experts lie in a mapped file, beside the work that is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..artefact.source import Weights
from ..forecast.work_time import Seconds
from .expert_memory import MAPPED, experts_bytes, memory_there
from .pilot import Pilot, read_back, written


class OnDisk(NamedTuple):
    """experts: bytes of a layer's. kept: bytes of the file that stay in memory from one crossing of a layer to the next."""

    experts: int
    kept: int

    @classmethod
    def of(cls, weights: Weights, needed: Mapping[str, Any]) -> OnDisk | None:
        """None where the experts are in memory."""
        if not needed.get(MAPPED):
            return None
        return cls(experts_bytes(weights), max(0, memory_there() - needed["peak_memory_bytes"]))

    def seconds(self, pilot: Pilot, layers: int, crossings: float, share: float = 1.0) -> Seconds:
        """Of filling the file for each of the layers, and of going through it so many times. share: of its bytes, in a narrower type.

        Pages that were used longest ago go first. So of a file that does not stay as a whole, nothing is left when it is begun again.
        """
        size = self.experts * share
        found = written(size, hashed=False)
        if size > self.kept:
            source = pilot.stream.source
            found += read_back(source.folder / source.shards()[0], size * crossings)
        return found * layers

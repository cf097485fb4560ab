"""What moves records into fast memory: how long that takes, and when it has ended."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ..errors import UsageError


class Transfer(ABC):
    """A copy that was begun. Until it has ended its source must stay as it is, and its target is not to be read."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended."""

    @abstractmethod
    def wait(self) -> None:
        """Until it has ended."""


class Device(ABC):
    """Fast memory behind a link."""

    @abstractmethod
    def copy(self, source: Tensor, target: Tensor) -> Transfer:
        """Begin to copy bytes uint8 [n] from host memory; copies end in the order in which they were begun."""

    def seconds(self, source: Tensor, target: Tensor, repeats: int = 5) -> float:
        """What one copy takes, the shortest of some."""
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.copy(source, target).wait()
            found.append(time.perf_counter() - began)
        return min(found)


class SimulatedDevice(Device):
    """Host memory behind a link of a bandwidth and a latency: each copy takes its time, one after the other.

    The bytes are moved when the end of a copy is noticed, so whoever reads its target before finds what was there.
    """

    def __init__(self, bandwidth: float, latency: float = 0.0) -> None:
        """Bytes per second, and seconds per copy."""
        if bandwidth <= 0 or latency < 0:
            raise UsageError(f"no link has {bandwidth:g} bytes/s and {latency:g} s", "give a positive bandwidth")
        self.bandwidth, self.latency, self.copied = bandwidth, latency, 0
        self._free = 0.0  # when the link is free again

    def copy(self, source: Tensor, target: Tensor) -> Transfer:
        self._free = max(self._free, time.perf_counter() + self.latency) + len(source) / self.bandwidth
        self.copied += len(source)
        return _Simulated(source, target, self._free)


@dataclass
class _Simulated(Transfer):
    source: Tensor
    target: Tensor
    until: float
    over: bool = False

    @property
    def done(self) -> bool:
        if not self.over and time.perf_counter() >= self.until:
            self.target.copy_(self.source)
            self.over = True
        return self.over

    def wait(self) -> None:
        while not self.done:
            time.sleep(max(0.0, self.until - time.perf_counter()))

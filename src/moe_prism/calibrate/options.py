"""What a calibration is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UsageError
from . import collectors
from .run import Settings


@dataclass(frozen=True)
class CalibrateOptions:
    """text: `stdlib`, `topics`, a file or a folder; tokens and length of the windows; reservoir tokens per expert; memory for statistics.

    low_memory keeps one decoder layer in memory at a time. collectors: what the pass keeps; `refactor` reads the default two.
    """

    text: str = "stdlib"
    tokens: int = 65_536
    length: int = 512
    reservoir: int = 2048
    memory_mib: int = 4096
    seed: int = 0
    low_memory: bool = False
    collectors: list[str] = field(default_factory=lambda: ["counts", "tokens"])  # a list: equal to what JSON gives back

    def check(self) -> None:
        """Raises UsageError naming the option that is out of range."""
        for name, least in (("tokens", 1), ("length", 8), ("reservoir", 64), ("memory_mib", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small", f"give at least {least}")
        for name in self.collectors:
            collectors.get(name)


def settings(options: CalibrateOptions) -> Settings:
    # a pass in low memory reads every layer from disk once per batch, so it takes many windows at once
    batch = 64 if options.low_memory else 8
    names = tuple(options.collectors)
    return Settings(names, capacity=options.reservoir, memory_bytes=options.memory_mib << 20, batch=batch, seed=options.seed)

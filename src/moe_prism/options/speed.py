"""What a forecast of tokens/s is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import Options, option
from .text import FIELDS

WINDOW = 256  # tokens of the windows that routing is counted on


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(Options):
    """The points to forecast, the load, and the machine: measured, or described by bandwidth, peak and fixed.

    >>> import moe_prism
    >>> moe_prism.SpeedOptions(concurrency=(1, 8)).keep
    (0.5,)
    """

    concurrency: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32), "Comma-separated counts of requests that decode together.", least=1
    )
    keep: tuple[float, ...] = option((0.5,), "Shares of the experts that pruning leaves; none: ''.", above=0, below=1)
    budgets: tuple[float, ...] | None = option(
        None,
        "Budgets, for a model written by `moe-prism refactor`; default 0.75,0.5,0.25, none: ''.",
        above=0,
        below=1,
    )
    context: float = option(256.0, "Mean tokens that a request attends to.", least=1)
    prompt: float = option(
        0.0,
        "Prompt tokens computed per generated token on the same device; 1 for 1024 in and 1024 out. 0: decoding alone.",
        least=0,
    )
    bandwidth: float | None = option(
        None,
        "Bytes per second that weights are read with, instead of measuring, like 3350GB/s; of all devices together.",
        unit=("B/s",),
    )
    peak: float | None = option(None, "Arithmetic per second, like 989TFLOPS.", unit=("FLOPS", "FLOP/s"))
    fixed: float | None = option(
        None, "Time per step whatever is in it, like 4ms; default with --bandwidth and --peak: 0s.", unit=("s",)
    )
    bits: float | None = option(
        None,
        "Bits per stored weight, if not the config's dtype; needed for quantized models.",
        above=0,
        most=64,
    )
    text: str | None = option(
        None,
        "Text to count routing on and to time steps on; default stdlib, with --bandwidth and --peak even routing.",
    )
    text_field: list[str] = option([], FIELDS)
    tokens: int = option(16_384, "Tokens to count routing on.", least=WINDOW)
    measure: bool = option(
        False,
        "Time every point that can be run at every concurrency and print it beside the prediction (pruning cannot).",
    )
    seconds: float = option(45.0, "About how long to time steps, twice that for a model that is elastic.", least=1, most=3600)

    @property
    def describes_a_machine(self) -> bool:
        """The machine is given, not measured."""
        return self.bandwidth is not None and self.peak is not None

    def check(self) -> None:
        super().check()
        if not self.concurrency:
            raise UsageError("--concurrency '' is no list of counts", "give one like 1,2,4,8")
        if not self.describes_a_machine and (self.bandwidth, self.peak, self.fixed) != (None, None, None):
            raise UsageError("a machine needs both --bandwidth and --peak", "give both, or neither to measure this machine")
        if self.text_field and self.text is None:
            raise UsageError("--text-field belongs to --text", "name a file of rows with --text, or leave it out")
        if self.measure and self.describes_a_machine:
            raise UsageError("--measure needs the machine itself", "leave out --bandwidth and --peak")

"""What splitting a dense model into experts is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import Options, WrittenType, nested, option
from .calibrate import CalibrateOptions


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Into how many experts every dense layer goes, which neurons go where, and on which text that is decided.

    >>> import moe_prism
    >>> moe_prism.SplitOptions(experts=16, shared=0.25).method
    'importance'
    """

    method: str = option(
        "importance", "Which neurons go where; see `moe-prism ls splits`.", names="moe_prism.methods.split:splits"
    )
    experts: int = option(
        16, "Routed experts per layer. With a power of two the dense model is kept to the last bit.", least=2, most=4096
    )
    active: int | None = option(
        None, "Routed experts per token. Default all of them, which is the dense model; methods of skipping then choose.", least=1
    )
    shared: float | None = option(
        None, "Share of the neurons in the expert that always runs. Default 0.25, for the method equal 0.", least=0, below=1
    )
    density: float = option(0.5, "Of the method read-me: share of the neurons in the mask of a domain.", above=0, most=1)
    dtype: WrittenType | None = option(
        None, "Type that a quantized source's weights are written in. Default its own; of GGUF bf16."
    )
    calibration: CalibrateOptions = nested(
        CalibrateOptions, "text", "text_field", "domains", "tokens", "length", "reservoir", "seed", "low_memory"
    )

    def check(self) -> None:
        super().check()
        if self.active is not None and self.active > self.experts:
            raise UsageError(
                f"--active {self.active} of --experts {self.experts}", "a token cannot have more experts than there are"
            )
        if self.method != "read-me" and self.density != SplitOptions.density:
            raise UsageError(f"--density means nothing to '{self.method}'", "leave it out, or say --method read-me")
        self.calibration.check()

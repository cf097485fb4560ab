"""What storing a model in fewer bits is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .base import Options, nested, option
from .calibrate import CalibrateOptions

OutputFormat = Literal["compressed-tensors", "records"]


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Options):
    """How experts are stored, and in which form they are written.

    >>> import moe_prism
    >>> moe_prism.CompressOptions(method="rtn:bits=8").format
    'compressed-tensors'
    """

    method: str = option(
        "rtn:bits=4:group=128",
        "Codec and its settings, such as rtn:bits=8 or rtn:bits=4:group=32; eaquant:bits=4:group=128 evens out inputs first.",
    )
    format: OutputFormat = option(
        "compressed-tensors",
        "What is written: compressed-tensors, which unmodified transformers and vLLM load (rtn of 4 and 8 bits); or records, "
        "one file of sub-experts that --expert-file reads (--method int8-rows, of a folder that refactor wrote).",
    )
    error_feedback: bool = option(
        False,
        "Round column after column, and make up for what is lost in the columns that follow, as calibration text uses them (GPTQ).",
    )
    calibration: CalibrateOptions = nested(CalibrateOptions, "text", "text_field", "domains", "tokens", "length", "low_memory")

    def check(self) -> None:
        super().check()
        self.calibration.check()

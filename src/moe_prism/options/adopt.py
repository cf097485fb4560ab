"""What an adoption is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Options, option
from .text import FIELDS


@dataclass(frozen=True, kw_only=True)
class AdoptOptions(Options):
    """How much text cutoffs and the price are measured on.

    >>> import moe_prism
    >>> moe_prism.AdoptOptions(tokens=4096).low_memory
    False
    """

    tokens: int = option(16_384, "Tokens of the elastic folder's calibration text that cutoffs are measured on.", least=512)
    text: str | None = option(None, "Another text for that; default the one the elastic folder was calibrated on.")
    text_field: list[str] = option([], FIELDS)
    low_memory: bool = option(False, "Keep one decoder layer in memory at a time. The price at half budget is not measured then.")

"""What a skip plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .base import LOW_MEMORY_WORDS, Options, option
from .frontier import check_windows
from .text import DEFAULT_TEXT, FIELDS, SOURCES, check_there, text_source


@dataclass(frozen=True, kw_only=True)
class SkipOptions(Options):
    """How a plan is made, and on which text it is fitted and measured.

    >>> import moe_prism
    >>> moe_prism.SkipOptions(mean=2).method
    'sensitivity'
    """

    method: str = option(
        "sensitivity",
        "How it is made; see `moe-prism ls methods` (those that act on routing).",
        method=("routing", "method of a skip plan"),
    )
    mean: float | None = option(
        None, "Experts per token and layer that are left on average; naee and pattern-skip:b-h-e-p do without."
    )
    keep_mass: bool | None = option(
        None, "Scale what is left of a token's routing weights up to their full sum; default: as the model's own router does it."
    )
    rounding: Literal["half-up", "floor", "ceil", "budget"] | None = option(
        None, "Of pattern-skip: half-up (default), floor, ceil, or budget (largest remainders; always so where --mean is given)."
    )
    index_over: Literal["moe", "all"] | None = option(
        None, "Of pattern-skip: whether its layers are the MoE layers (moe, default) or all layers (all)."
    )
    text: str | None = option(None, f"{SOURCES}: one side to fit on, the other to measure the plan on. {DEFAULT_TEXT}")
    text_field: list[str] = option([], FIELDS)
    tokens: int = option(8_192, "Tokens to fit on, and as many to measure on.")
    length: int = option(512, "Tokens per window.")
    low_memory: bool = option(False, LOW_MEMORY_WORDS)

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the method, by name, what was given beside what its name says."""
        own = {"rounding": self.rounding, "index_over": self.index_over}
        return {name: value for name, value in own.items() if value is not None}

    def check(self) -> None:
        super().check()
        if self.text is not None:
            check_there(text_source(self.text, self.text_field))
        check_windows(self.length, tokens=self.tokens)

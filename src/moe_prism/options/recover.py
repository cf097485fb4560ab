"""What a recovery is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from .base import LOW_MEMORY_WORDS, Options, option
from .text import FIELDS, SOURCES

RATE = 1e-3
OF_ROUTER = ("loss", "curriculum", "rate")


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(Options):
    """Which method wins back quality, and on what text.

    >>> import moe_prism
    >>> moe_prism.RecoverOptions(bands=3).method
    'repair'
    """

    method: str = option(
        "repair",
        "repair: W_down of cut experts, by least squares. predictor: the predictor, trained to choose slots; for both, run it "
        "before repair. router: the router of a folder that `refactor --reslice` wrote.",
        names="moe_prism.recover:methods",
    )
    bands: int = option(
        1,
        "Of repair: copies of W_down, each for a range of dropped sub-experts, at most n_sub - 1; each adds a third of the expert "
        "weights to memory.",
        least=1,
    )
    steps: int = option(96, "Of predictor and router: training steps, of two windows and of four.", least=1)
    loss: Literal["next-token", "kl"] = option(
        "next-token", "Of router: the loss of the next token (the paper's), or KL to the source model."
    )
    curriculum: Literal["rising", "drawn"] = option(
        "rising",
        "Of router: sub-experts per token rise evenly from k to all over the steps (the paper's), or are drawn per step.",
    )
    rate: float = option(RATE, "Of router: the highest learning rate.", above=0.0)
    text: str | None = option(
        None,
        f"Calibration text: {SOURCES}; default: what FOLDER was calibrated on.",
    )
    text_field: list[str] = option([], FIELDS)
    tokens: int = option(65_536, "Calibration tokens.", least=1)
    length: int = option(512, "Tokens per window.", least=8)
    memory_mib: int = option(4096, "Of repair: limit for the equations of the layers that are summed in one pass.", least=1)
    low_memory: bool = option(False, f"Of repair: {LOW_MEMORY_WORDS[0].lower()}{LOW_MEMORY_WORDS[1:]}")
    seed: int = option(0, "Of predictor and router: which windows, budgets and K are drawn.", least=0)

    def check(self) -> None:
        super().check()
        if self.method != "router":
            for name in OF_ROUTER:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UsageError(f"--{name} belongs to --method router", f"leave it out of --method {self.method}")
        if self.low_memory and self.method != "repair":
            raise UsageError(
                f"--method {self.method} is trained by gradient through all layers, which must be in memory",
                "leave --low-memory out",
            )

"""What a refactoring is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from .base import DTYPE_WORDS, Options, WrittenType, nested, option
from .calibrate import CalibrateOptions


@dataclass(frozen=True, kw_only=True)
class RefactorOptions(Options):
    """How experts are cut into sub-experts, and what is fitted for them.

    >>> import moe_prism
    >>> moe_prism.RefactorOptions(n_sub=8).solver
    'alt'
    """

    n_sub: int = option(4, "Sub-experts per expert (must divide the expert's neurons).", least=2)
    gates: int = option(0, "Gate neurons per sub-expert, which predictors read beside the input; all of them are computed.")
    solver: str = option("alt", "Partition solver; see `moe-prism ls solvers`.", names="moe_prism.partition:solvers")
    objective: str = option(
        "paper", "What the solver keeps together; see `moe-prism ls objectives`.", names="moe_prism.partition:objectives"
    )
    gate_choice: str = option(
        "energy", "How gate neurons are chosen; see `moe-prism ls gates`.", names="moe_prism.partition:gates"
    )
    dropped: int | None = option(None, "Sub-experts the partition objective charges; default n-sub - 1.")
    seed: int = option(0, "Seed of sampling and solvers. Same inputs and seed, same bytes.")
    profile_tokens: int = option(
        4096,
        "Calibration tokens run once per layer to learn how to spend a budget across layers; 0 = every layer alike.",
        least=0,
    )
    compensate: str = option(
        "mean",
        "What makes up for dropped sub-experts: none, or a name of `moe-prism ls compensators`.",
        names="moe_prism.elastic.compensate:compensators",
        also=("none",),
    )
    rank: int = option(2, "Rank of `--compensate low-rank`.", least=1)
    profile_points: int = option(
        0,
        "Budgets at which every layer is run once more, to refine the rule `plan`; each takes as long as the profile.",
        least=0,
    )
    calibration: CalibrateOptions = nested(
        CalibrateOptions, "text", "text_field", "domains", "tokens", "length", "reservoir", "memory_mib", "seed", "low_memory"
    )
    dtype: WrittenType | None = option(None, DTYPE_WORDS)
    keep_format: bool = option(
        False,
        "Write a quantized source in its own format: codes move where groups stay whole, other groups get new codes and a searched scale.",
    )
    keep_codes: bool = option(
        False, "The same, and only whole groups of neurons move: every code stays, at the price of a weaker partition."
    )
    align: str | None = option(
        None,
        "Take the largest number of sub-experts up to --n-sub whose width is a multiple of this: a number, or auto, the group of the "
        "source's format.",
    )
    extra_scorers: list[str] = option(
        [],
        "Predictors to fit beside the default one, e.g. low-rank; see `moe-prism ls scorers`.",
        names="moe_prism.elastic.scorers:scorers",
    )

    def check(self) -> None:
        super().check()
        if self.dropped is not None and not 1 <= self.dropped < self.n_sub:
            raise UsageError(f"--dropped {self.dropped} is outside 1..{self.n_sub - 1}", "leave it out for N-1, the paper's code")
        if self.keep_format and self.keep_codes:
            raise UsageError("--keep-format and --keep-codes exclude each other", "give one of them")
        if self.dtype and (self.keep_format or self.keep_codes):
            raise UsageError("--dtype writes plain weights, --keep-format and --keep-codes do not", "give one of them")
        if self.align not in (None, "auto") and not (self.align.isdecimal() and int(self.align) > 0):
            raise UsageError(f"--align {self.align} is neither auto nor a number of neurons", "give auto, or a number like 32")
        self.calibration.check()

    @property
    def keep(self) -> Literal["format", "codes"] | None:
        """What of a quantized source's format is kept."""
        return "codes" if self.keep_codes else "format" if self.keep_format else None

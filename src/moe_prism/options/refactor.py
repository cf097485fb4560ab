"""What a refactoring is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from .base import Options, nested, option
from .calibrate import CalibrateOptions


@dataclass(frozen=True, kw_only=True)
class RefactorOptions(Options):
    """How experts are cut into sub-experts, and what is fitted for them."""

    n_sub: int = option(4, "Sub-experts per expert (must divide the expert's neurons).", least=2)
    gates: int = option(1, "Gate neurons per sub-expert, computed for every candidate block.")
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
        CalibrateOptions, "text", "tokens", "length", "reservoir", "memory_mib", "seed", "low_memory"
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
        self.calibration.check()

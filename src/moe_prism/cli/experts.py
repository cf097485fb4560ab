"""Options of the commands that can run a model whose experts stay on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from ..store import StoreOptions


@Parameter(name="*")
@dataclass(frozen=True)
class Experts:
    """Experts on disk."""

    expert_memory: Annotated[
        str | None,
        Parameter(help="Keep the experts on disk and this much of them in memory, for example 200MB; default all of them."),
    ] = None
    expert_file: Annotated[
        Path | None, Parameter(help="Where they are packed for that, written on first use; default experts.pack in the folder.")
    ] = None
    expert_policy: Annotated[
        str | None,
        Parameter(
            help="Who leaves when room is needed, see `moe-prism ls cache-policies`; default lfu, or edge-moe for few slots per layer."
        ),
    ] = None
    expert_ahead: Annotated[
        int, Parameter(help="Sub-experts to read ahead of a layer at most, by the next layer's router on this layer's input.")
    ] = 0
    miss_floor: Annotated[
        float,
        Parameter(
            help="Budget at which sub-experts are read that are not in memory, below --budget; those in memory are used up to --budget."
        ),
    ] = 1.0
    int8_budget: Annotated[
        float | None, Parameter(help="Budget up to which missing ones are then read in int8 form instead of being skipped.")
    ] = None

    def options(self) -> StoreOptions | None:
        """What a store is opened with; None for a model in memory. UsageError for an option that would do nothing."""
        from ..errors import UsageError

        if self.expert_memory is None:
            for name, value in vars(self).items():
                if value != getattr(Experts, name):
                    raise UsageError(f"--{name.replace('_', '-')} is of no use alone", "give --expert-memory as well")
            return None
        from ..store import StoreOptions, parse_bytes
        from ..store.choose_misses import Misses

        if self.expert_ahead < 0:
            raise UsageError(f"--expert-ahead {self.expert_ahead} is impossible", "give 0 or more")
        misses = Misses(self.miss_floor, self.int8_budget)
        return StoreOptions(
            parse_bytes(self.expert_memory), self.expert_file, self.expert_policy, misses=misses, ahead=self.expert_ahead
        )

"""What a router is asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import UsageError
from .base import flag_of, option
from .serve import ListenOptions


@dataclass(frozen=True, kw_only=True)
class RouteOptions(ListenOptions):
    """Where a router listens, or what a pool is measured on.

    >>> import moe_prism
    >>> moe_prism.RouteOptions(out="record.json").check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --measure and --out go together; give a file of questions and where its record goes
    """

    measure: Path | None = option(
        None,
        'Instead of serving: ask every model at every level each of these questions, lines like {"prompt": ..., "answer": ...}, and end.',
    )
    out: Path | None = option(None, "With --measure: the file for the record, which pool.yaml then names.")
    tokens: int = option(16, "With --measure: tokens of an answer at most.", least=1, most=4096)
    debug: bool = option(False, "Plain logs with stack traces.")

    def check(self) -> None:
        super().check()
        if (self.measure is None) != (self.out is None):
            raise UsageError("--measure and --out go together", "give a file of questions and where its record goes")
        usual = {declared.name: declared.default for declared in fields(self)}
        if self.measure is None and self.tokens != usual["tokens"]:
            raise UsageError("--tokens belongs to --measure", "leave it out: requests say how many tokens they want")
        served = next((d for d in fields(ListenOptions) if getattr(self, d.name) != usual[d.name]), None)
        if self.measure is not None and served is not None:
            raise UsageError(f"{flag_of(served)} does not go with --measure, which serves nothing", "leave it out")

"""A rehearsal of a job: every check of the real run, and what it would need, without its first long step.

Jobs call `begin` between the two. So a rehearsal cannot forget an argument that the run looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import check_output
from ..checkpoint.config import WRONG
from ..errors import PrismError
from ..forecast.work_time import Seconds
from ..options.machine import OtherMachine
from ..result import Result
from .resources import SIZED_FOR, check_resources

Lasts = Callable[[], Seconds | None]
_is_rehearsal: ContextVar[Seconds | None] = ContextVar("_is_rehearsal", default=None)
"""Since when, in a rehearsal."""


class _Stop(Exception):
    """Everything was checked."""

    def __init__(self, needed: Mapping[str, Any]) -> None:
        self.needed = needed
        super().__init__("a rehearsal ends here")


@dataclass(frozen=True)
class JobForecast(Result):
    """What a job needs. needed: peak_memory_bytes and its parts, disk_bytes, and other facts of the run.

    seconds on the clock and cpu_seconds of processors, with the checks before the work; None where no batch of it can be run by itself.
    machine: what it was asked for, if that is not this one.
    """

    needed: Mapping[str, Any]

    @property
    def peak_memory_bytes(self) -> int:
        return int(self.needed["peak_memory_bytes"])

    @property
    def disk_bytes(self) -> int:
        return int(self.needed["disk_bytes"])

    @property
    def seconds(self) -> float | None:
        found: float | None = self.needed.get("seconds")
        return found

    def to_json(self) -> dict[str, Any]:
        return dict(self.needed)

    def to_records(self) -> list[dict[str, Any]]:
        """A row per part of the memory, and one for the disk."""
        return [{"what": name, "bytes": value} for name, value in self.needed.items() if name.endswith("_bytes")]


def begin(
    needed: Mapping[str, Any],
    out: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    lasts: Lasts | None = None,
) -> None:
    """The last line of a job before its work. In a rehearsal the job ends here; else DoesNotFit where this machine has too little.

    out: the folder it writes, if it writes one; a rehearsal also says where that is taken. lasts: says how long the work will take.
    UsageError.
    """
    began = _is_rehearsal.get()
    if began is not None:
        if out is not None:
            check_output(out, force=force, resume=resume)
        checked = Seconds.now() - began
        raise _Stop({**needed, **_time(checked, lasts)})
    check_resources(needed, out or Path.cwd(), resume)


def check_early(needed: Mapping[str, Any], out: str | Path, resume: bool) -> None:
    """DoesNotFit where this machine has too little, before steps that take longer than to say so. A rehearsal says what is needed first."""
    if _is_rehearsal.get() is None:
        check_resources(needed, out, resume)


def _time(checked: Seconds, lasts: Lasts | None) -> dict[str, float | None]:
    """Of a job whose checks took so long: seconds on the clock and of processors, None where they are not known."""
    try:
        work = lasts() if lasts else None
    except (
        *WRONG,
        OSError,
        PrismError,
    ):  # a layer that cannot be run by itself, a full disk: what the job needs is known all the same
        work = None
    if work is None:
        return {"seconds": None, "cpu_seconds": None}
    total = checked + work
    return {"seconds": round(total.wall, 1), "cpu_seconds": round(total.cpu, 1)}


@contextmanager
def _rehearsing(machine: OtherMachine | None) -> Iterator[None]:
    token, sized = _is_rehearsal.set(Seconds.now()), SIZED_FOR.set(machine)
    try:
        yield
    finally:
        _is_rehearsal.reset(token)
        SIZED_FOR.reset(sized)


def on_machine(needed: Mapping[str, Any], machine: OtherMachine | None) -> dict[str, Any]:
    """What was found here, as it would be on that machine, which it then names."""
    if machine is None:
        return dict(needed)
    seconds = needed.get("seconds")
    if seconds is not None and machine.cores is not None:
        seconds = round(seconds * torch.get_num_threads() / machine.cores, 1)
    return {**needed, "seconds": seconds, "machine": machine.to_json()}


def rehearse(job: Callable[..., object], *given: Any, machine: OtherMachine | None = None, **named: Any) -> JobForecast:
    """Check everything that a job would check, and say what it needs. Nothing is written, and no weight is read that need not be.

    job: a function of `moe_prism` that does long work, with its arguments: `rehearse(refactor, "nano", "out")`.
    machine: what it would run on; then seconds are this machine's, divided by how many times more cores there are, as if all of the work
    divided. Raises what the job would raise, but for a machine that has too little.

    >>> import moe_prism
    >>> asked = moe_prism.CalibrateOptions(tokens=1024, length=256)
    >>> needed = moe_prism.rehearse(moe_prism.calibrate_model, "nano", "statistics", asked)
    >>> needed.peak_memory_bytes > needed.to_json()["weights_bytes"] > 0
    True
    """
    with _rehearsing(machine):
        try:
            job(*given, **named)
        except _Stop as stop:
            return JobForecast(on_machine(stop.needed, machine))
    return JobForecast({"peak_memory_bytes": 0, "disk_bytes": 0})  # it was finished already

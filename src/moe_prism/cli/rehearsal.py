"""What `--dry-run` does, the same for every command."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options import Options, option
from ..options.machine import OtherMachine
from .output import emit, note

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rehearsal(Options):
    """What a command is asked that may say what it needs instead of doing it."""

    dry_run: bool = option(False, "Check everything, print what it needs and exit; 3 if this machine cannot do it.")
    for_machine: str | None = option(
        None, "With --dry-run: another machine, like ram=64GB,cores=32,disk=1TB. What is not named is as here."
    )

    def check(self) -> None:
        super().check()
        if self.for_machine is not None and not self.dry_run:
            raise UsageError("--for-machine sizes another machine, on which nothing can run from here", "add --dry-run")
        self.machine()

    def machine(self) -> OtherMachine | None:
        """The other one, if any. UsageError for what says none."""
        return None if self.for_machine is None else OtherMachine.of(self.for_machine)


def show_rehearsal(
    asked: Rehearsal,
    job: Callable[..., object],
    *given: Any,
    target: Path | None = None,
    as_json: bool = False,
    **named: Any,
) -> None:
    """Check all that the run would check, and show what it needs; then DoesNotFit where the machine has less."""
    from ..jobs.rehearsal import rehearse
    from ..jobs.resources import check_resources

    started = time.process_time()  # what the real run spends before it, too: the imports of these lines, above all
    machine = asked.machine()
    needed = with_start(rehearse(job, *given, machine=machine, **named).to_json(), started)
    if (
        not as_json
    ):  # shown even where it does not fit; stdout of --json holds one object, then that of the error with the same in it
        emit(needed, _sizes(needed), as_json)
    check_resources(needed, target or Path.cwd(), machine=machine)
    note(f"{'this' if machine is None else 'such a'} machine has enough of both")
    if as_json:
        emit(needed, "", as_json)


def with_start(needed: dict[str, Any], started: float) -> dict[str, Any]:
    """With the seconds that the command had taken before its checks, on the clock and of processors."""
    if needed.get("seconds") is None:
        return needed
    return needed | {name: round(needed[name] + started, 1) for name in ("seconds", "cpu_seconds")}


def _sizes(needed: dict[str, Any]) -> str:
    """Memory, its parts, disk, then time."""
    sizes = {key: value / GIB for key, value in needed.items() if key.endswith("bytes")}
    memory, disk = (f"{key:22} {sizes.pop(key):8.2f} GiB" for key in ("peak_memory_bytes", "disk_bytes"))
    where = ["a layer's experts lie in a file beside the output while it is worked on"] if needed.get("experts_on_disk") else []
    return "\n".join([memory, *(f"  {key:20} {size:8.2f} GiB" for key, size in sizes.items()), disk, *where, duration(needed)])


def duration(needed: Mapping[str, Any]) -> str:
    """About N min, or s; on other cores as if they were of this machine's kind."""
    seconds, cores = needed.get("seconds"), (needed.get("machine") or {}).get("cores")
    if seconds is None:
        return "time: not known before it runs"
    about = f"time: about {seconds / 60:.0f} min" if seconds >= 90 else f"time: about {seconds:.0f} s"
    return about if cores is None else f"{about} on {cores} cores like those of this machine, if all of the work divides"

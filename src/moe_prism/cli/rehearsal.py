"""What `--dry-run` does, the same for every command."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .output import emit, note

GIB = 2**30


def show_rehearsal(
    job: Callable[..., object], *given: Any, target: Path | None = None, as_json: bool = False, **named: Any
) -> None:
    """Check all that the run would check, and show what it needs; then DoesNotFit where this machine has less."""
    started = time.process_time()  # what the real run spends before it, too: imports, above all
    from ..jobs.rehearsal import rehearse
    from ..jobs.resources import check_resources

    needed = rehearse(job, *given, **named).to_json()
    needed = with_start(needed, started)
    if not as_json:  # shown even where it does not fit; stdout of --json holds one object, then that of the error
        emit(needed, _sizes(needed), as_json)
    check_resources(needed, target or Path.cwd())
    note("this machine has enough of both")
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
    return "\n".join(
        [memory, *(f"  {key:20} {size:8.2f} GiB" for key, size in sizes.items()), disk, duration(needed.get("seconds"))]
    )


def duration(seconds: float | None) -> str:
    """About N min, or s."""
    if seconds is None:
        return "time: not known before it runs"
    return f"time: about {seconds / 60:.0f} min" if seconds >= 90 else f"time: about {seconds:.0f} s"

"""What `--dry-run` does, the same for every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .output import emit, note

GIB = 2**30


def show_rehearsal(
    job: Callable[..., object], *given: Any, target: Path | None = None, as_json: bool = False, **named: Any
) -> None:
    """Check all that the run would check, and show what it needs; then DoesNotFit where this machine has less."""
    from ..jobs.rehearsal import rehearse
    from ..jobs.resources import check_resources

    needed = rehearse(job, *given, **named).to_json()
    if not as_json:  # shown even where it does not fit; stdout of --json holds one object, then that of the error
        emit(needed, _sizes(needed), as_json)
    check_resources(needed, target or Path.cwd())
    note("this machine has enough of both")
    if as_json:
        emit(needed, "", as_json)


def _sizes(needed: dict[str, Any]) -> str:
    """Memory, its parts, then disk."""
    sizes = {key: value / GIB for key, value in needed.items() if key.endswith("bytes")}
    memory, disk = (f"{key:22} {sizes.pop(key):8.2f} GiB" for key in ("peak_memory_bytes", "disk_bytes"))
    return "\n".join([memory, *(f"  {key:20} {size:8.2f} GiB" for key, size in sizes.items()), disk])

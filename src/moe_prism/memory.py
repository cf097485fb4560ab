"""How much memory a process may still take: what the machine has, within the limits of the process's control groups."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 writes a number beside which nothing is a limit
UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


def available_memory() -> int:
    """Bytes that a process could take now without anybody swapping or being killed."""
    return min([_of_machine("MemAvailable"), *(limit - used for limit, used in _limits())])


def total_memory() -> int:
    """Bytes that there are: of the machine, or of the smallest control group around this process."""
    return min([_of_machine("MemTotal"), *(limit for limit, _ in _limits())])


def resident_memory() -> int:
    """Bytes of memory that this process holds."""
    try:
        return int((PROC / "self" / "statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def parse_bytes(text: str, what: str = "memory", instead: str = "") -> int:
    """'200MB', '1.5GiB', '65536' -> bytes. UsageError for anything else, or for none.

    what: of which they are an amount; instead: a word that may be given in its place, told with the error.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in UNITS or not float(found[1]):
        raise UsageError(
            f"'{text}' is no amount of {what}",
            f"give for example 200MB, 1.5GiB, a number of bytes{f', or {instead}' if instead else ''}",
        )
    return int(float(found[1]) * UNITS[found[2].lower()])


def _of_machine(name: str) -> int:
    try:
        text = (PROC / "meminfo").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))
    except (OSError, ValueError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, what is used of it and cannot be dropped) of every control group around this process that has a limit."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if number == "0":  # version 2
            yield from _walked(GROUPS, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in kinds.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _walked(GROUPS / "memory", path, names)


def _walked(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    """From a group to the root; in a container the path may be that of the machine outside, and only the root is there."""
    own = root / path.lstrip("/")
    for folder in dict.fromkeys([own, *(parent for parent in own.parents if parent.is_relative_to(root)), root]):
        limit, used = (_number(folder / name) for name in names[:2])
        if limit is not None and used is not None and limit < UNLIMITED:
            yield limit, max(0, used - _reclaimable(folder / "memory.stat", names[2]))


def _number(file: Path) -> int | None:
    """None where there is no such file, or "max" in it."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _reclaimable(file: Path, name: str) -> int:
    """Pages of files that nobody looked at lately: they count as used, and go when somebody needs the room."""
    try:
        rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
        return next((int(row[1]) for row in rows if row and row[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0

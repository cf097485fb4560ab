"""How many processors a process may use, and how its threads wait. To be settled before torch starts its threads."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "2000"
"""How often a waiting thread of libgomp looks before it sleeps."""


def cores() -> int:
    """Processors this process may use: its affinity, and the quota of its control group, rounded down to at least one."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return own if quota is None else max(1, min(own, int(quota)))


def settle_threads() -> None:
    """Set how many threads torch starts, and that they do not wait at the cost of others. What the user has set stays.

    A thread of OpenMP that has nothing to do looks for work without pause for milliseconds. Beside another process it then takes the
    turn of a thread that has some, which the whole layer waits for.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if "OMP_NUM_THREADS" not in os.environ and _quota() is not None:
        os.environ["OMP_NUM_THREADS"] = str(cores())


@cache
def processor() -> str:
    """The name of this machine's processor: what is measured on one holds on no other."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _quota() -> float | None:
    """Processors' worth of time that the control groups of this process allow; None without a limit."""
    found = [_limit(group) for group in _groups()]
    return min((quota for quota in found if quota is not None), default=None)


def _groups() -> list[Path]:
    """The folders of this process's control group and those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    own = GROUPS / name
    return [own, *(parent for parent in own.parents if parent.is_relative_to(GROUPS))]


def _limit(group: Path) -> float | None:
    """The limit of one group, in the form of version 2 ("200000 100000") or 1; None where there is none."""
    try:
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (group / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    try:
        return float(quota) / float(period) if float(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None

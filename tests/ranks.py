"""Our commands under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys


def run_ranks(*asked: str) -> None:
    """Run a command in two processes with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe_prism", *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=600, preexec_fn=_two_cores)


def _two_cores() -> None:
    """Processes share the cores that they may use: with more of them products would have more threads than those of one process here."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

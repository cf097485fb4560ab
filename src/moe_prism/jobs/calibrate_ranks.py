"""Calibrate with several processes that `torchrun` has started: each runs a part of the text, and the first one adds up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import distributed

from ..artefact.output import Writing
from ..calibrate.statistics import Statistics
from ..checkpoint.atomic import check_output
from ..cores import cores
from ..options.calibrate import CalibrateOptions
from ..progress import silent
from .calibrate import calibrate_model, calibrate_part
from .join_calibrations import join_calibrations


def ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1


def own_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Threads of this process among those on its machine: what OMP_NUM_THREADS says, else an even share of the cores.

    A 1 says nothing: torchrun sets it where nobody has set anything.
    """
    given = environment.get("OMP_NUM_THREADS", "1")
    if given.isdecimal() and int(given) > 1:
        return int(given)
    return max(1, cores() // int(environment.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def group() -> Iterator[tuple[int, int]]:
    """(number of this process, how many there are), while they are connected and share the machine's threads."""
    distributed.init_process_group("gloo")
    try:
        count = distributed.get_world_size()
        torch.set_num_threads(own_threads())
        yield distributed.get_rank(), count
    finally:
        distributed.destroy_process_group()


def calibrate_ranks(model: str | Path, out: str | Path, options: CalibrateOptions, **how: Unpack[Writing]) -> Statistics | None:
    """The result of `calibrate_model`; None in every process but the first. All of them call it with the same arguments.

    Between them lie files beside `out`, so that an interrupted run is continued with `resume`.
    """
    with group() as (rank, count):
        return divided(model, out, options, (rank, count), how)


def divided(
    model: str | Path, out: str | Path, options: CalibrateOptions, place: tuple[int, int], how: Writing
) -> Statistics | None:
    """The same within a group. Text that the model makes itself is run by the first process alone."""
    rank, count = place
    given = Path(out).expanduser()
    if rank == 0:
        check_output(given, force=how.get("force", False), resume=how.get("resume", False))
    distributed.barrier()
    if options.tasks:
        return calibrate_model(model, out, options, **how) if rank == 0 else None
    parts = [given.with_name(f"{given.name}.part-{i}") for i in range(count)]
    own: Any = how if rank == 0 else {**how, "report": silent}
    calibrate_part(model, parts[rank], f"{rank + 1}/{count}", options, **own)
    distributed.barrier()
    if rank:
        return None
    found = join_calibrations(model, out, parts, options, **how)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    return found

"""Refactor with several processes that `torchrun` has started: each solves its layers, and the first one writes the result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import distributed

from ..artefact.output import Writing
from ..checkpoint.atomic import check_output
from ..options.refactor import RefactorOptions
from ..progress import silent
from .calibrate import calibrate_model
from .refactor import Refactored, refactor, refactor_shard


def ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1


def refactor_ranks(
    model: str | Path,
    out: str | Path,
    options: RefactorOptions,
    *,
    calibration: str | Path | None = None,
    **how: Unpack[Writing],
) -> Refactored | None:
    """The result of `refactor`, to the byte; None in every process but the first. All of them call it with the same arguments.

    The first process calibrates, all solve their layers, the first one writes. Between them lie files beside `out`, so that an
    interrupted run is continued with `resume`.
    """
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    given = Path(out).expanduser()
    statistics, parts = given.with_name(f"{given.name}.statistics"), [_part(given, i) for i in range(count)]
    try:
        if rank == 0:
            check_output(given, force=how.get("force", False), resume=how.get("resume", False))
            if calibration is None:
                calibrate_model(model, statistics, replace(options.calibration, collectors=["counts", "tokens"]), **how)
        distributed.barrier()
        source = calibration or statistics
        own: Any = how if rank == 0 else {**how, "report": silent}
        refactor_shard(model, parts[rank], f"{rank + 1}/{count}", options, calibration=source, **own)
        distributed.barrier()
        if rank:
            return None
        done = refactor(model, out, options, calibration=source, shards=parts, **how)
        for part in parts:
            shutil.rmtree(part.with_name(f"{part.name}.partial"), ignore_errors=True)
        shutil.rmtree(statistics, ignore_errors=True)
        return done
    finally:
        distributed.destroy_process_group()


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank-{rank}")

"""Refactor with several processes that `torchrun` has started: each runs its part of the text and solves its layers, and the first
one writes the result.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import distributed

from ..artefact.output import Writing
from ..checkpoint.atomic import check_output
from ..options.refactor import RefactorOptions
from ..progress import silent
from .calibrate_ranks import divided, group
from .refactor import Refactored, refactor, refactor_shard


def refactor_ranks(
    model: str | Path,
    out: str | Path,
    options: RefactorOptions,
    *,
    calibration: str | Path | None = None,
    **how: Unpack[Writing],
) -> Refactored | None:
    """The result of `refactor`, to the byte; None in every process but the first. All of them call it with the same arguments.

    All calibrate on their part of the text and solve their layers, the first one adds up and writes. Between them lie files beside `out`,
    so that an interrupted run is continued with `resume`.
    """
    with group() as (rank, count):
        given = Path(out).expanduser()
        statistics, parts = given.with_name(f"{given.name}.statistics"), [_part(given, i) for i in range(count)]
        if rank == 0:
            check_output(given, force=how.get("force", False), resume=how.get("resume", False))
        if calibration is None:
            divided(model, statistics, replace(options.calibration, collectors=["counts", "tokens"]), (rank, count), how)
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


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank-{rank}")

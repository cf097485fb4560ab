"""`moe-prism recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.recover import RecoverOptions
from .flags import Run
from .output import emit, note, progress
from .rehearsal import Rehearsal, show_rehearsal


def recover(
    folder: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: RecoverOptions,
    rehearsal: Rehearsal,
    run: Run,
) -> None:
    """Write a copy of an elastic model that loses less below full budget. At full budget it is the same model, but for --method router.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`; for --method router by `moe-prism refactor --reslice`.
    out: Folder to write. It appears only when it is complete.
    resume: Continue an interrupted repair, or the training of a router; ends in the same bytes. Training a predictor starts again.
    """
    from ..checkpoint import elastic_manifest

    if options.method != "router":
        elastic_manifest(folder)  # or another folder is refused, before the work is imported
    from ..jobs.recover import recover_model

    if rehearsal.dry_run:
        how = {"resume": run.resume, "force": run.force}
        return show_rehearsal(rehearsal, recover_model, folder, out, options, target=out, as_json=run.json, **how)
    result = recover_model(folder, out, options, resume=run.resume, force=run.force, report=progress)
    facts = result.to_json()
    note(f"next: moe-prism frontier {out}")
    emit(
        facts,
        f"{facts['folder']}: {facts['method']} from {facts['tokens']} tokens, "
        f"{facts['resident_bytes'] / 2**20:.1f} MiB more in memory ({facts['resident_share']:.0%} of the expert weights), "
        f"peak memory {facts['peak_rss_bytes'] / 2**30:.2f} GiB",
        run.json,
    )
    return None

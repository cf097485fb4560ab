"""`moe-prism trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.trace import TraceOptions
from .output import emit, note, progress
from .rehearsal import Rehearsal, show_rehearsal


def trace(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: TraceOptions,
    force: bool = False,
    rehearsal: Rehearsal,
    json: bool = False,
) -> None:
    """Record which experts and sub-experts every token of some text uses: what caches and predictors are replayed on.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a folder written by `moe-prism refactor`, a hub name, 'nano' or 'nano-mix'.
    out: The .npz file to write.
    force: Replace an existing file.
    json: One JSON object on stdout.
    """
    from ..files import check_writable

    check_writable(out)
    from ..jobs.trace import record_trace

    if rehearsal.dry_run:
        return show_rehearsal(rehearsal, record_trace, model, out, options, as_json=json, force=force)
    found = record_trace(model, out, options, force=force, report=progress)
    facts = {"file": str(out), "bytes": out.stat().st_size, **found.to_json()}
    note(f"next: moe-prism inspect {model} --routing --trace {out}")
    emit(
        facts,
        f"{out}: {facts['tokens']} tokens of {facts['requests']} requests, {facts['layers']} layers, "
        f"{facts['slots_per_token']:.2f} of {found.k * found.n_sub} slots per token, {facts['bytes'] / 1024:.0f} KiB",
        json,
    )
    return None

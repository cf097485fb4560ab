"""`moe-prism compress`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from ..options import Options, option
from ..options.compress import CompressOptions
from .flags import Run
from .output import emit, note, note_left_out, progress


@dataclass(frozen=True, kw_only=True)
class Trial(Options):
    """Whether anything is written."""

    dry_run: bool = option(False, "Say what would be written, and read no weights.")
    report_only: bool = option(False, "Say how far the weights would move, and write nothing.")


def compress(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: CompressOptions,
    trial: Trial,
    run: Run,
) -> None:
    """Write a checkpoint whose experts take fewer bits, which unmodified transformers and vLLM load.

    Parameters
    ----------
    model: Folder with config.json and safetensors, 'nano' or 'nano-mix'.
    out: Folder to write, or the file of --format records. It appears only when it is complete.
    """
    from ..jobs.compress import compress_model, measure_compression, plan_compression

    if trial.dry_run and trial.report_only:
        raise UsageError("--dry-run and --report-only exclude each other", "give one of them")
    if trial.dry_run:
        result = plan_compression(model, options)
    elif trial.report_only:
        result = measure_compression(model, options, report=progress)
    elif out is None:
        raise UsageError("there is no output folder", "give --out FOLDER, --dry-run or --report-only")
    else:
        result = compress_model(model, out, options, resume=run.resume, force=run.force, report=progress)
        if options.format != "records":
            note(f"next: moe-prism verify {out}")
    facts = result.to_json()
    note_left_out(facts.get("left_out", {}))
    emit(facts, _show(facts), run.json)


def _show(facts: dict[str, Any]) -> str:
    before, after = facts["expert_bytes"]["before"], facts["expert_bytes"]["after"]
    error = facts["relative_error"]
    moved = "" if error is None else f"\nsquared error of the weights: {error:.2e} of their squares"
    where = f"{facts['folder']}: " if "folder" in facts else ""
    words = f"{facts['matrices']} matrices of experts, {before / 1e6:.3f} MB -> {after / 1e6:.3f} MB ({after / before:.1%})"
    return f"{where}{words}, {facts['method']}{moved}"

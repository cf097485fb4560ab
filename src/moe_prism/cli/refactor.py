"""`moe-prism refactor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.refactor import RefactorOptions
from ..progress import Report
from .flags import Run
from .output import emit, note, note_left_out, progress
from .rehearsal import show_rehearsal
from .texts import told_text

GIB = 2**30


def refactor(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: RefactorOptions,
    calibration: Path | None = None,
    dry_run: bool = False,
    run: Run,
) -> None:
    """Cut every expert of a checkpoint into sub-experts; the result is the same model in the same files, made elastic.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, 'nano' or 'nano-mix'.
    out: Folder to write. It appears only when it is complete.
    memory_mib: Limit for all statistics together.
    low_memory: Keep one decoder layer in memory at a time, with the hidden states of all text. The result is the same.
    calibration: Folder written by `moe-prism calibrate`, instead of --text, --tokens, --length, --reservoir and --memory-mib.
    dry_run: Print what it needs and exit; 3 if this machine cannot do it.
    """
    from ..jobs.refactor import refactor as write

    report: Report = progress
    if calibration is None:
        told, report = told_text(model, options.calibration, "calibration text", "; its other files are left for evaluation")
        options = replace(options, calibration=told)
    if dry_run:
        given = {"calibration": calibration, "resume": run.resume, "force": run.force}
        return show_rehearsal(write, model, out, options, target=out, **given, as_json=run.json)
    done = write(model, out, options, calibration=calibration, resume=run.resume, force=run.force, report=report)
    facts = done.to_json()
    note_left_out(facts["left_out"])
    if kept := facts["kept_format"]:
        note(
            f"{kept['format']} kept: {kept['requantized']} of {kept['weights']} matrices quantized again, relative error "
            f"{kept['relative_error']:.4f}, KL {kept['kl']:.5f} to the source ({kept['kl_tokens']} tokens)"
        )
    note(f"next: moe-prism frontier {out}")
    emit(
        facts,
        f"{facts['folder']}: {facts['layers']} layers, {facts['n_sub']} sub-experts per expert, "
        f"partition cost {facts['partition_cost_share']:.3f} of the activation mass, "
        f"{facts['starved_experts']} starved experts, peak memory {facts['peak_rss_bytes'] / GIB:.2f} GiB",
        run.json,
    )
    return None

"""`moe-prism calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.calibrate import CalibrateOptions
from ..progress import Report
from .flags import Run
from .output import emit, note, progress
from .rehearsal import show_rehearsal
from .texts import told_text


def calibrate(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: CalibrateOptions,
    dry_run: bool = False,
    run: Run,
) -> None:
    """Run calibration text through a model once and keep bounded statistics that every `refactor` of it can use.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, 'nano' or 'nano-mix'.
    out: Folder to write. It appears only when it is complete.
    resume: Continue an interrupted pass; ends in the same bytes.
    dry_run: Check everything, print what it needs and exit; 3 if this machine cannot do it.
    """
    from ..jobs.calibrate import calibrate_model

    report: Report = progress
    if not options.tasks:
        options, report = told_text(model, options, "calibration text")
    if dry_run:
        return show_rehearsal(
            calibrate_model, model, out, options, target=out, as_json=run.json, resume=run.resume, force=run.force
        )
    statistics = calibrate_model(model, out, options, resume=run.resume, force=run.force, report=report)
    facts = {"folder": str(out), **statistics.to_json()}
    if tasks := facts.get("tasks"):
        said = f"{tasks['answered']} tasks answered with {tasks['answer_tokens']} tokens, {tasks['ended']} of them to an end"
        note(f"{said}: {out / 'answers.jsonl'}")
        for reason, count in tasks.get("left_out", {}).items():
            note(f"left out: {reason} {count}")
    starved = facts["starved"]
    for row in starved[:5]:
        few = f"expert {row['expert']} of layer {row['layer']} was chosen for {row['tokens']} sampled tokens only"
        note(f"warning: {few}; refactor falls back to its weights")
    note(f"next: moe-prism refactor {model} --calibration {out} -o OUT")
    emit(facts, f"{out}: {facts['layers']} layers, {facts['tokens']} tokens, {len(starved)} starved experts", run.json)
    return None

"""`moe-prism calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.calibrate import CalibrateOptions
from .flags import Run
from .output import emit, note, progress
from .texts import told_text


def calibrate(
    model: str, /, *, out: Annotated[Path, Parameter(name=("--out", "-o"))], options: CalibrateOptions, run: Run
) -> None:
    """Run calibration text through a model once and keep bounded statistics that every `refactor` of it can use.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, 'nano' or 'nano-mix'.
    out: Folder to write. It appears only when it is complete.
    resume: Continue an interrupted pass; ends in the same bytes.
    """
    from ..jobs.calibrate import STARVED, calibrate_model

    if not options.tasks:
        options = told_text(model, options, "calibration text")
    statistics = calibrate_model(model, out, options, resume=run.resume, force=run.force, report=progress)
    starved = statistics.starved(min(STARVED, statistics.facts["capacity"]))
    facts = {
        "folder": str(out),
        "layers": len(statistics.layers),
        "tokens": statistics.facts["tokens"],
        "reservoir": statistics.facts["capacity"],
        "starved": [{"layer": layer, "expert": e, "tokens": n} for layer, e, n in starved],
    }
    if tasks := statistics.facts.get("tasks"):
        facts["tasks"] = tasks
        said = f"{tasks['answered']} tasks answered with {tasks['answer_tokens']} tokens, {tasks['ended']} of them to an end"
        note(f"{said}: {out / 'answers.jsonl'}")
        for reason, count in tasks.get("left_out", {}).items():
            note(f"left out: {reason} {count}")
    if domains := statistics.facts.get("domains"):
        facts["domains"] = domains
    for layer, e, n in starved[:5]:
        note(f"warning: expert {e} of layer {layer} was chosen for {n} sampled tokens only; refactor falls back to its weights")
    note(f"next: moe-prism refactor {model} --calibration {out} -o OUT")
    emit(facts, f"{out}: {facts['layers']} layers, {facts['tokens']} tokens, {len(starved)} starved experts", run.json)

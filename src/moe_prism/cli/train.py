"""`moe-prism train`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options import Options, option
from .flags import Run
from .output import emit, note, progress
from .rehearsal import Rehearsal, show_rehearsal


@dataclass(frozen=True, kw_only=True)
class TrainChanges(Options):
    """What flags say instead of the file."""

    set: list[str] = option([], "KEY=VALUE in the recipe, like seed=1 or model.active=2.", is_repeated=True)


def train(
    recipe: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    changes: TrainChanges,
    rehearsal: Rehearsal,
    run: Run,
) -> None:
    """Train a small mixture of experts from a recipe: its architecture, sizes, text and steps. Writes an ordinary checkpoint.

    Parameters
    ----------
    recipe: A .yaml file; those of recipes/zoo are examples, `moe-prism ls architectures` lists what can be trained.
    out: Folder to write. It appears only when it is complete.
    resume: Continue an interrupted training from its last state; ends in the same losses to the bit.
    """
    from ..jobs.train import train as train_model

    speaks = os.environ.get("RANK", "0") == "0"  # one of several processes
    how = {"changes": changes.set, "resume": run.resume, "force": run.force}
    if rehearsal.dry_run:
        return show_rehearsal(rehearsal, train_model, recipe, out, target=out, as_json=run.json, **how) if speaks else None
    facts = train_model(recipe, out, changes=changes.set, resume=run.resume, force=run.force, report=progress).to_json()
    if not speaks:
        return None
    text = (
        f"{facts['folder']}: {facts['parameters'] / 1e6:.2f} million parameters, {facts['tokens']:,} tokens, "
        f"held-out loss {facts['held_out_loss']:.4f} {facts['unit']}"
    )
    emit(facts, text, run.json)
    note(
        f"next: moe-prism frontier {out} -o report --methods uniform"
        if facts["text_tokens"]
        else f"next: moe-prism inspect {out}"
    )
    return None

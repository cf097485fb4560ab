"""`moe-prism split`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from ..options.split import SplitOptions
from .flags import Run
from .output import emit, note, note_left_out, progress, table
from .rehearsal import Rehearsal, show_rehearsal


def split(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: SplitOptions,
    run: Run,
    rehearsal: Rehearsal,
) -> None:
    """Write a dense model as a Mixture-of-Experts model: the same function with all experts on, less work with fewer.

    Parameters
    ----------
    model: A dense model of Llama's kind: folder with config.json and safetensors, a .gguf file or a hub name.
    out: Folder to write. It appears only when it is complete.
    """
    from ..jobs.split import split_model

    if out is None:
        raise UsageError("there is no output folder", "give --out FOLDER")
    if rehearsal.dry_run:
        how = {"resume": run.resume, "force": run.force}
        return show_rehearsal(rehearsal, split_model, model, out, options, target=out, as_json=run.json, **how)
    result = split_model(model, out, options, resume=run.resume, force=run.force, report=progress)
    facts = result.to_json()
    note_left_out(facts.get("left_out", {}))
    emit(facts, _show(facts), run.json)
    note(f"next: moe-prism frontier {out} -o report --methods uniform --judge all")
    return None


def _show(facts: dict[str, Any]) -> str:
    masks = "jaccard_mean" in facts["layers"][0]
    head = (
        "layer",
        f"error at {facts['errors_at']} of {facts['experts']}",
        "random router",
        *(("masks alike",) if masks else ()),
    )
    rows = [
        (i, f"{row['error']:.4f}", f"{row['error_of_random_router']:.4f}", *((f"{row['jaccard_mean']:.3f}",) if masks else ()))
        for i, row in enumerate(facts["layers"])
    ]
    width = f"{facts['shared_neurons']} neurons always run, {facts['experts']} experts have {facts['expert_neurons']} each"
    return (
        f"{table(head, rows)}\n{facts['folder']}: {width}; {facts['active']} experts per token\n"
        f"all experts on: the largest difference of a logit is {facts['all_on_difference']:.1e} of the largest logit"
    )

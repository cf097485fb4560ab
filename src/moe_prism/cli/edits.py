"""`moe-prism compress --recipe`: a chain of edits in one file, each on the output of the one before."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import UsageError
from ..options.compress import CompressOptions
from .compress import Trial
from .compress import compress as one_edit
from .flags import Run
from .recipe import run_steps, show_steps

EDITS: Mapping[str, str] = {"prune": "prune", "slice": "compress", "merge": "compress", "quantize": "compress"}
"""Words of a recipe of edits, and the commands that they stand for."""
Lines = dict[tuple[str | int, ...], int]
OF_THE_CHAIN = ("model", "out")


def compress(
    model: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    recipe: Path | None = None,
    options: CompressOptions,
    trial: Trial,
    run: Run,
) -> None:
    """Write a checkpoint whose experts take fewer bits, have fewer neurons or were merged, which unmodified transformers and vLLM load.

    With --recipe a chain of edits: the output of each is the model of the next, and the last one's prism.json holds all of them.

    Parameters
    ----------
    model: Folder with config.json and safetensors, 'nano' or 'nano-mix'.
    out: Folder to write, or the file of --format records. It appears only when it is complete.
    dry_run: Say what would be written and what that needs, and read no weights; exits with 3 if this machine cannot do it.
    recipe: A .yaml file with a list of edits, prune, merge, slice and quantize, each with the flags of `prune` or `compress` below it.
    """
    if recipe is None:
        return one_edit(model, out=out, options=options, trial=trial, run=run)
    if options != CompressOptions() or trial.report_only or trial.for_machine:
        raise UsageError("--recipe says all there is to say", "leave the other options out, or write them into the file")
    if out is None:
        raise UsageError("there is no output folder", "give --out FOLDER")
    resolved = read_edits(recipe, model, out)
    if trial.dry_run:
        return show_steps(resolved, run.json)
    run_steps(resolved, run)
    for number in range(len(resolved["steps"]) - 1):
        shutil.rmtree(between(out, number), ignore_errors=True)
    return None


def read_edits(path: Path, model: str, out: Path) -> dict[str, Any]:
    """The edits as a recipe of `moe-prism run`, with all defaults filled in: every output but the last is a folder beside `out`.

    UsageError names the file and the line of what is wrong.
    """
    from ..schema.lines import mapping_in
    from .recipe_file import NEXT, check_step, checked  # pydantic is slow to import

    data, lines = mapping_in(path, "a mapping with 'edits'", NEXT)
    unknown = next((key for key in data if key != "edits"), None)
    if unknown is not None:
        raise UsageError(f"{path}:{lines.get((unknown,), 1)}: a recipe of edits has no '{unknown}'", "leave it out")
    edits = data.get("edits")
    if not isinstance(edits, list) or not edits:
        raise UsageError(f"{path}:1: a recipe of edits has a list of them below 'edits'", f"choose from: {', '.join(EDITS)}")
    steps: list[dict[str, Any]] = []
    moved: Lines = {}
    for number, edit in enumerate(edits):
        line = lines.get(("edits", number), 1)
        check_step(edit, line, str(path), tuple(EDITS))
        ((word, flags),) = edit.items()
        if not isinstance(flags, dict):
            raise UsageError(f"{path}:{line}: {word} has no flags below it", NEXT)
        for name in OF_THE_CHAIN:
            if name in flags:
                raise UsageError(
                    f"{path}:{lines['edits', number, word, name]}: {word} has no '{name}' in a chain", "leave it out"
                )
        moved |= _moved(lines, number, word)
        target = out if number == len(edits) - 1 else between(out, number)
        steps.append({EDITS[word]: {**flags, "out": str(target)}})
    return checked({"model": model, "steps": steps}, moved, str(path)).model_dump(mode="json", exclude_none=True)


def between(out: Path, number: int) -> Path:
    """What an edit hands on to the next."""
    return out.with_name(f"{out.name}.edit-{number + 1}")


def _moved(lines: Lines, number: int, word: str) -> Lines:
    """The lines of an edit by the places that a recipe's steps have."""
    found: Lines = {("steps", number): lines.get(("edits", number), 1)}
    for place, line in lines.items():
        if place[:3] == ("edits", number, word):
            found["steps", number, EDITS[word], *place[3:]] = line
    return found

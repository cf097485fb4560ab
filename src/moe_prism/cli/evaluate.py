"""`moe-prism eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.evaluate import EvaluateOptions
from .output import note, progress, table, written


def evaluate(
    folder: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    options: EvaluateOptions,
    json: bool = False,
) -> None:
    """Run tasks of EleutherAI's lm-eval at operating points of a model, with standard errors. Needs `moe-prism[eval]`.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, or any checkpoint (give --out).
    out: Folder for eval.json; default is FOLDER itself, beside its frontier.
    json: One JSON object on stdout.
    """
    from ..files import check_writable_folder
    from ..jobs.evaluate_checks import check_installed, check_target

    check_writable_folder(out)
    target = check_target(folder, out)
    check_installed()
    from ..frontier.evaluation import score_rows
    from ..jobs.evaluate import evaluate_model, keep
    from ..jobs.frontier_files import add_tasks

    result = evaluate_model(folder, options, report=progress)
    text = table(("task", "metric", *(p.name for p in result.points)), score_rows(result.points))
    with written(result.to_json(), text, json):
        path = keep(result, target)
    note(f"tasks: {path}")
    if add_tasks(target):
        note(f"report: {target / 'report.html'}")

"""Tasks of EleutherAI's lm-eval at operating points, in this process; the figures lie beside the frontier."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..artefact.open import Opened, open_model, own_point
from ..checkpoint import put_file, versions
from ..checkpoint.recipe import recipe_facts
from ..errors import UsageError
from ..frontier.evaluation import FILE, Evaluated, Evaluation, Score
from ..options.evaluate import EvaluateOptions
from ..point import FULL, NamedPoint, OperatingPoint
from ..progress import Report, silent
from ..registry import choices
from .evaluate_checks import check_installed


def keep(result: Evaluation, target: Path) -> Path:
    """Write eval.json into a folder, where prism.json then lists it."""
    target.mkdir(parents=True, exist_ok=True)
    put_file(target / FILE, result.encoded())
    return target / FILE


def evaluate_model(folder: str | Path, options: EvaluateOptions, *, report: Report = silent) -> Evaluation:
    """Run tasks of lm-eval at operating points of a model: elastic, pruned or any other that is loaded from disk.

    Raises UsageError without lm-eval (`moe-prism[eval]`), for an unknown task, or a point that this model cannot run.

    >>> import moe_prism
    >>> moe_prism.evaluate_model("elastic", moe_prism.EvaluateOptions(tasks=["arc_easy"], points=["full", "full"]))
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --points names one twice; name each once
    """
    options.check()
    manager = task_manager(options)
    named = [_point(asked, folder) for asked in options.points]
    opened = open_model(folder)
    for point in named:
        with opened.elastic.at([point.point]):  # what cannot run is refused before the first task
            pass
    found = []
    with report("points") as update:
        update(0, len(named))
        for done, point in enumerate(named, 1):
            found.append(Evaluated(point.name, point.point, _scores(opened, point.point, options, manager)))
            update(done, len(named))
    library = versions() | {"lm_eval": _version()}
    provenance = {"options": asdict(options), **recipe_facts(), "versions": library}
    return Evaluation(opened.name, tuple(found), provenance)


def task_manager(options: EvaluateOptions) -> Any:
    """lm-eval's tasks, with those of --include-path. UsageError for a task that there is not, or without the library."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default of every task
    check_installed()
    from lm_eval.tasks import TaskManager

    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UsageError(f"--include-path '{options.include_path}' is no folder", "give one with tasks in YAML")
    manager = TaskManager(include_path=options.include_path)
    for task in options.tasks:
        if not manager.match_tasks([task]):
            near = choices(task, manager.all_tasks).partition("? ")[0]
            hint = f"{near}?" if near.startswith("did you mean") else "see `lm-eval ls tasks`"
            raise UsageError(f"lm-eval has no task '{task}'", hint)
    return manager


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _point(asked: str, folder: str | Path) -> NamedPoint:
    """full, a budget, a name in the folder's frontier.json, or a file."""
    if asked == "full":
        return NamedPoint(name="full", point=FULL)
    try:
        budget = float(asked)
    except ValueError:
        return own_point(asked, folder)
    if not 0 < budget <= 1:
        raise UsageError(f"--points: budget {asked} is outside (0, 1]", "1 keeps every slot, 0.5 half of the bytes")
    return NamedPoint(name=f"budget-{budget:g}", point=FULL.with_budget(budget))


def _scores(opened: Opened, point: OperatingPoint, options: EvaluateOptions, manager: Any) -> tuple[Score, ...]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=options.batch_size, backend="causal")
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), options.seed)
    with opened.elastic.at([point]):
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(options.tasks),
                task_manager=manager,
                limit=options.limit if options.limit is None or options.limit < 1 else int(options.limit),
                num_fewshot=options.num_fewshot,
                apply_chat_template=options.chat,
                log_samples=False,
                **seeds,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise UsageError(
                f"lm-eval cannot run these tasks: {reason}", "check the tasks, and that their data is on this machine"
            ) from error
    if found is None:
        raise UsageError("lm-eval gave no result", "run it on the first process alone")
    return read_scores(found)


def read_scores(found: Mapping[str, Any]) -> tuple[Score, ...]:
    """Every metric of lm-eval's result that is a number, in the order of tasks."""
    scores = []
    for task, values in found["results"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        questions = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            stderr = float(error) if isinstance(error, int | float) else None
            name = metric if kind == "none" else f"{metric},{kind}"
            scores.append(Score(task, name, float(value), stderr, bool(better.get(metric, True)), int(questions)))
    return tuple(scores)

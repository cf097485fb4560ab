"""`moe-prism run` and `moe-prism recipe`: one YAML file for a whole job."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..options import Options, option
from .flags import Run
from .output import emit, note


@dataclass(frozen=True, kw_only=True)
class Changes(Options):
    """What flags say instead of the file."""

    model: str | None = option(None, "Another model than the recipe's.")
    set: list[str] = option(
        [], "KEY=VALUE in the recipe, like refactor.n_sub=8; 2.frontier.tokens=4096 of the second step.", is_repeated=True
    )


@dataclass(frozen=True, kw_only=True)
class Again(Options):
    """How the steps are run."""

    resume: bool = option(False, "Continue an interrupted run: finished outputs stay, the one in work goes on.")
    force: bool = option(False, "Replace existing outputs.")
    json: bool = option(False, "One JSON object per step on stdout.")


def run(recipe: Path, /, *, changes: Changes, dry_run: bool = False, again: Again) -> None:
    """Run the steps of a recipe, one after the other. Every output's prism.json holds the recipe with all its defaults filled in.

    Parameters
    ----------
    recipe: A .yaml file: a model, and a list of commands with their flags. Paths are seen from where you are.
    dry_run: Print the commands that it stands for, and run none.
    """
    from .recipe_file import read_recipe

    read = read_recipe(recipe, changes.set, changes.model)
    resolved = read.model_dump(mode="json", exclude_none=True)
    if dry_run:
        return show_steps(resolved, again.json)
    return run_steps(resolved, again)


def show_steps(resolved: dict[str, Any], as_json: bool) -> None:
    """The commands that a recipe stands for."""
    lines = command_lines(resolved)
    emit({"commands": lines}, "\n".join(shlex.join(["moe-prism", *words]) for words in lines), as_json)


def run_steps(resolved: dict[str, Any], again: Again | Run) -> None:
    """One after the other; what each writes says which recipe it is of."""
    from ..checkpoint.recipe import recorded_recipe
    from .recipe_form import check_options

    for step in resolved["steps"]:
        ((command, options),) = step.items()
        check_options(command, options)
    app, lines = _app(), command_lines(resolved)
    with recorded_recipe(resolved):
        for number, words in enumerate(lines, 1):
            note(f"step {number} of {len(lines)}: moe-prism {shlex.join(words)}")
            app([*words, *_run_flags(words[0], again)], exit_on_error=False, print_error=False)


def recipe(
    action: Literal["show", "validate", "schema"], file: Path | None = None, /, *, changes: Changes, json: bool = False
) -> None:
    """Look at a recipe without running it: show it with all defaults, check it, or print the JSON schema that editors take.

    Parameters
    ----------
    action: show, validate or schema.
    file: The .yaml file; none for schema.
    json: One JSON object on stdout.
    """
    import json as plain

    import yaml

    from .recipe_file import read_recipe
    from .recipe_form import recipe_form

    if action == "schema":
        schema = recipe_form().model_json_schema()
        return emit(schema, plain.dumps(schema, indent=1), json)
    if file is None:
        raise UsageError(f"recipe {action} needs a file", f"moe-prism recipe {action} recipe.yaml")
    resolved = read_recipe(file, changes.set, changes.model).model_dump(mode="json", exclude_none=True)
    if action == "show":
        return emit(resolved, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), json)
    facts = {"file": str(file), "model": resolved["model"], "steps": [next(iter(step)) for step in resolved["steps"]]}
    return emit(facts, f"{file}: {facts['model']}, then {', '.join(facts['steps'])}", json)


def command_lines(resolved: dict[str, Any]) -> list[list[str]]:
    """The words of each step's command. A step without a model of its own takes the output of the last one that wrote a model."""
    from .recipe_form import STEP_MODEL, WRITES_MODEL, words_of

    model, lines = str(resolved["model"]), []
    source = {key: resolved[key] for key in ("revision", "dtype", "device", "device_map") if resolved.get(key) is not None}
    for step in resolved["steps"]:
        ((command, options),) = step.items()
        given = str(options.get(STEP_MODEL) or model)
        lines.append([command, given, *words_of(command, options), *_opening(command, given, resolved, source)])
        if command in WRITES_MODEL and options.get("out"):
            model = str(options["out"])
    return lines


def _opening(command: str, given: str, resolved: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """Flags for where the model comes from and where it computes, as far as the command has them."""
    from .opening import RUNS, type_flag
    from .recipe_form import COMMANDS

    words = ["--follow-links"] if resolved.get("follow_links") and command != "verify" else []
    if "revision" in source and given == resolved["model"]:
        words += ["--revision", source["revision"]]
    if command in RUNS:
        flags = {"dtype": type_flag(COMMANDS[command]), "device": "--device", "device_map": "--device-map"}
        words += [word for key, flag in flags.items() if key in source for word in (flag, source[key])]
    return words


def _run_flags(command: str, again: Again | Run) -> list[str]:
    import inspect

    from .recipe_form import COMMANDS

    takes = "run" in inspect.signature(COMMANDS[command]).parameters
    words = ["--json"] if again.json else []
    words += ["--resume"] if again.resume and takes else []
    return words + (["--force"] if again.force and (takes or command == "trace") else [])


def _app() -> Callable[..., Any]:
    from . import build

    return build()


__all__: Sequence[str] = ("recipe", "run")

"""A recipe's file: YAML within bounds, and errors that name file, line and the nearest key. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import UsageError
from ..schema.lines import Lines, Place, mapping_in, nearest, parsed, told
from .recipe_form import COMMANDS, recipe_form, step_form

NEXT = "see `moe-prism recipe schema`"


def read_recipe(path: str | Path, changes: Sequence[str] = (), model: str | None = None) -> BaseModel:
    """The recipe of a file with --set changes and --model in it, checked. UsageError names the file and the line of what is wrong."""
    data, lines = mapping_in(path, "a mapping with 'model' and 'steps'", NEXT)
    if model is not None:
        data["model"] = model
    for change in changes:
        _apply(data, change, str(path))
    steps = data.get("steps")
    for number, step in enumerate(steps if isinstance(steps, list) else ()):
        check_step(step, lines.get(("steps", number), 1), str(path))
    return checked(data, lines, str(path))


def checked(data: dict[str, Any], lines: Lines, name: str) -> BaseModel:
    """A whole recipe. UsageError names the file and the line of what is wrong."""
    try:
        return recipe_form().model_validate(data)
    except ValidationError as error:
        raise told(error, lines, name, _owner, NEXT) from error


def check_step(step: Any, line: int, name: str, known: Sequence[str] = tuple(COMMANDS)) -> None:
    """UsageError for a step that is not one known word with its flags."""
    if not isinstance(step, dict) or len(step) != 1:
        raise UsageError(f"{name}:{line}: a step is one command with its flags below", f"choose from: {', '.join(known)}")
    (command,) = step
    if command not in known:
        raise UsageError(f"{name}:{line}: no step '{command}'", nearest(str(command), known))
    if step[command] is None:
        step[command] = {}  # a command with no flags


def _owner(place: Place) -> tuple[str, int, Sequence[str]]:
    """Whose key a place is: a step's command, or the recipe's own."""
    command = str(place[2]) if len(place) > 2 and place[0] == "steps" else ""
    known = list(step_form(command).model_fields) if command in COMMANDS else list(recipe_form().model_fields)
    return command, 3 if command else 0, known


def _apply(data: dict[str, Any], change: str, name: str) -> None:
    """--set model=..., --set refactor.n_sub=8, or --set 2.frontier.tokens=4096 where a command stands there more than once."""
    path, sign, text = change.partition("=")
    parts = path.split(".")
    if not sign or not all(parts) or len(parts) > 3:
        raise UsageError(f"--set '{change}' is not KEY=VALUE", "write it like refactor.n_sub=8")
    value, _ = parsed(text.encode(), "--set")
    if len(parts) == 1:
        data[parts[0]] = value
        return
    number = int(parts.pop(0)) if parts[0].isdigit() else None
    if len(parts) != 2:
        raise UsageError(f"--set '{change}' names no flag of a step", "write it like refactor.n_sub=8")
    command, flag = parts
    found = [(i, step) for i, step in _steps(data) if command in step and number in (None, i)]
    if len(found) != 1:
        places = ", ".join(f"{i}.{command}" for i, step in _steps(data) if command in step)
        raise UsageError(
            f"--set '{change}': {name} has {len(found)} such steps", f"name one: {places}" if places else f"it has no {command}"
        )
    step = found[0][1]
    step[command] = {**(step[command] or {}), flag.replace("-", "_"): value}


def _steps(data: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, step)."""
    steps = data.get("steps")
    for number, step in enumerate(steps if isinstance(steps, list) else (), 1):
        if isinstance(step, dict):
            yield number, step

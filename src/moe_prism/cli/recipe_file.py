"""A recipe's file: YAML within bounds, and errors that name file, line and the nearest key. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UsageError
from .recipe_form import COMMANDS, recipe_form, step_form

MOST_BYTES = 1 << 20
MOST_DEPTH = 16
Place = tuple[str | int, ...]
Lines = dict[Place, int]
NEXT = "see `moe-prism recipe schema`"


def read_recipe(path: str | Path, changes: Sequence[str] = (), model: str | None = None) -> BaseModel:
    """The recipe of a file with --set changes and --model in it, checked. UsageError names the file and the line of what is wrong."""
    data, lines = mapping_in(path, "a mapping with 'model' and 'steps'")
    if model is not None:
        data["model"] = model
    for change in changes:
        _apply(data, change, str(path))
    steps = data.get("steps")
    for number, step in enumerate(steps if isinstance(steps, list) else ()):
        check_step(step, lines.get(("steps", number), 1), str(path))
    return checked(data, lines, str(path))


def mapping_in(path: str | Path, what: str) -> tuple[dict[str, Any], Lines]:
    """(what the file says, line of every key and entry by its place). UsageError for anything but a mapping; what: it should hold."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give the .yaml file of a recipe") from error
    if len(text) > MOST_BYTES:
        raise UsageError(f"{path} is larger than {MOST_BYTES >> 20} MiB", "give the .yaml file of a recipe")
    data, lines = parsed(text, str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path}:1: a recipe is {what}", NEXT)
    return data, lines


def checked(data: dict[str, Any], lines: Lines, name: str) -> BaseModel:
    """A whole recipe. UsageError names the file and the line of what is wrong."""
    try:
        return recipe_form().model_validate(data)
    except ValidationError as error:
        raise _told(error, lines, name) from error


def parsed(text: bytes, name: str) -> tuple[Any, dict[Place, int]]:
    """(what the YAML says, line of every key and entry by its place). UsageError for what is no YAML, for aliases and repeated keys."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        _walk(node, (), lines, name, set())
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UsageError(f"{where}: no YAML: {getattr(error, 'problem', None) or 'unreadable'}", "mend that line") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: no YAML that can be read: {type(error).__name__}", "mend it") from error


def _walk(node: Any, place: Place, lines: dict[Place, int], name: str, seen: set[int]) -> None:
    if node is None:
        return
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if id(node) in seen:
        raise UsageError(f"{name}:{line}: an alias, which a recipe has none of", "write it out")
    seen.add(id(node))
    if len(place) > MOST_DEPTH:
        raise UsageError(f"{name}:{line}: nested too deep", NEXT)
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{name}:{at}: a key must be a name", NEXT)
            if key.value in keys:
                raise UsageError(f"{name}:{at}: '{key.value}' stands there twice", "leave one of them")
            keys.add(key.value)
            lines[*place, key.value] = at
            _walk(value, (*place, key.value), lines, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _walk(value, (*place, number), lines, name, seen)


def check_step(step: Any, line: int, name: str, known: Sequence[str] = tuple(COMMANDS)) -> None:
    """UsageError for a step that is not one known word with its flags."""
    if not isinstance(step, dict) or len(step) != 1:
        raise UsageError(f"{name}:{line}: a step is one command with its flags below", f"choose from: {', '.join(known)}")
    (command,) = step
    if command not in known:
        raise UsageError(f"{name}:{line}: no step '{command}'", _nearest(str(command), known))
    if step[command] is None:
        step[command] = {}  # a command with no flags


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(known)}"


def _told(error: ValidationError, lines: dict[Place, int], name: str) -> UsageError:
    """Pydantic's first error in one line."""
    first = error.errors(include_url=False)[0]
    place: Place = tuple(first["loc"])
    at = next(lines[place[:i]] for i in range(len(place), -1, -1) if place[:i] in lines)
    command = str(place[2]) if len(place) > 2 and place[0] == "steps" else ""
    where, key = f"{name}:{at}", str(place[-1]) if place else ""
    if first["type"] == "extra_forbidden":
        known = list(step_form(command).model_fields) if command in COMMANDS else list(recipe_form().model_fields)
        return UsageError(f"{where}: {command or 'a recipe'} has no '{key}'", _nearest(key, known))
    if first["type"] == "missing":
        return UsageError(f"{where}: {command or 'the recipe'} lacks '{key}'", NEXT)
    shown = ".".join(str(part) for part in place[3 if command else 0 :])
    said = first["msg"][:1].lower() + first["msg"][1:]
    return UsageError(f"{where}: {command + ' ' if command else ''}{shown}: {said}", NEXT)


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

"""YAML that a user writes, with the line of every key: for errors that name file, line and the nearest known word. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import UsageError

MOST_BYTES = 1 << 20
MOST_DEPTH = 16
Place = tuple[str | int, ...]
Lines = dict[Place, int]


def mapping_in(path: str | Path, what: str, advice: str, kind: str = "recipe") -> tuple[dict[str, Any], Lines]:
    """(what the file says, line of every key and entry by its place). UsageError for anything but a mapping.

    what: it should be; advice: where its form is told; kind: what such a file is called.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", f"give the .yaml file of a {kind}") from error
    if len(text) > MOST_BYTES:
        raise UsageError(f"{path} is larger than {MOST_BYTES >> 20} MiB", f"give the .yaml file of a {kind}")
    data, lines = parsed(text, str(path), advice)
    if not isinstance(data, dict):
        raise UsageError(f"{path}:1: a {kind} is {what}", advice)
    return data, lines


def parsed(text: bytes, name: str, advice: str = "mend it") -> tuple[Any, Lines]:
    """(what the YAML says, line of every key and entry by its place). UsageError for what is no YAML, for aliases and repeated keys."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: Lines = {}
        _walk(node, (), lines, name, advice)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UsageError(f"{where}: no YAML: {getattr(error, 'problem', None) or 'unreadable'}", "mend that line") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: no YAML that can be read: {type(error).__name__}", "mend it") from error


def _walk(node: Any, place: Place, lines: Lines, name: str, advice: str, seen: set[int] | None = None) -> None:
    if node is None:
        return
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    seen = set() if seen is None else seen
    if id(node) in seen:
        raise UsageError(f"{name}:{line}: an alias, which no such file has", "write it out")
    seen.add(id(node))
    if len(place) > MOST_DEPTH:
        raise UsageError(f"{name}:{line}: nested too deep", advice)
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{name}:{at}: a key must be a name", advice)
            if key.value in keys:
                raise UsageError(f"{name}:{at}: '{key.value}' stands there twice", "leave one of them")
            keys.add(key.value)
            lines[*place, key.value] = at
            _walk(value, (*place, key.value), lines, name, advice, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _walk(value, (*place, number), lines, name, advice, seen)


def nearest(word: str, known: Sequence[str]) -> str:
    """The next step after an unknown word."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(known)}"


def told(
    error: ValidationError,
    lines: Lines,
    name: str,
    owner: Callable[[Place], tuple[str, int, Sequence[str]]],
    advice: str,
    kind: str = "recipe",
) -> UsageError:
    """Pydantic's first error in one line, an unknown key before all others.

    owner(place): whose key it is, how much of the place says so, and the keys that it knows. kind: what such a file is called.
    """
    every = error.errors(include_url=False)
    first = next((each for each in every if each["type"] == "extra_forbidden"), every[0])  # what lacks was misspelt
    place: Place = tuple(first["loc"])
    at = next((lines[place[:i]] for i in range(len(place), -1, -1) if place[:i] in lines), 1)
    whose, deep, known = owner(place)
    where, key = f"{name}:{at}", str(place[-1]) if place else ""
    if first["type"] == "extra_forbidden":
        return UsageError(f"{where}: {whose or f'a {kind}'} has no '{key}'", nearest(key, known))
    if first["type"] == "missing":
        whose = whose if len(place) > 1 else ""  # a part that is not there lacks nothing: who should have it does
        return UsageError(f"{where}: {whose or f'the {kind}'} lacks '{key}'", advice)
    shown = ".".join(str(part) for part in place[deep:])
    said = first["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return UsageError(f"{where}: {whose + ' ' if whose else ''}{shown + ': ' if shown else ''}{said}", advice)

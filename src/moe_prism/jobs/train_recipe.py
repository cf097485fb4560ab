"""A recipe of `moe-prism train`, from YAML or plain values, checked to its last key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..architectures import architectures
from ..errors import UsageError
from ..schema.lines import Lines, Place, mapping_in, nearest, parsed, told
from ..schema.training import ExchangeForm, ShapeForm, TrainingForm

NEXT = "see docs/how-to/train-a-model.md"
WHAT = "a mapping with 'architecture', 'model' and 'steps', or 'start' and 'steps'"
DEEPEST = 2  # parts of a KEY


def read_training(recipe: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> TrainingForm:
    """The recipe of a file, or of plain values, with changes (KEY=VALUE) in it. UsageError names the file and the line of what is wrong."""
    if isinstance(recipe, Mapping):
        data, lines, name = {**recipe}, Lines(), "the recipe"
    else:
        data, lines = mapping_in(recipe, WHAT, NEXT)
        name = str(recipe)
    for change in changes:
        _apply(data, change)
    try:
        found = TrainingForm.model_validate(data)
    except ValidationError as error:
        raise told(error, lines, name, _owner, NEXT) from error
    _check_architecture(found, lines, name)
    return found


def _check_architecture(recipe: TrainingForm, lines: Lines, name: str) -> None:
    if recipe.architecture is None:
        if recipe.settings:
            raise UsageError(f"{name}:{lines.get(('settings',), 1)}: settings are of an architecture, and none is named", NEXT)
        return
    known = architectures.names()
    if recipe.architecture not in known:
        where = f"{name}:{lines.get(('architecture',), 1)}"
        raise UsageError(f"{where}: no architecture '{recipe.architecture}'", nearest(recipe.architecture, known))
    form = architectures.get(recipe.architecture).Settings
    try:
        form.model_validate(recipe.settings)
    except ValidationError as error:
        inside: Lines = {place[1:]: line for place, line in lines.items() if place[:1] == ("settings",)}

        def owner(_place: Place) -> tuple[str, int, Sequence[str]]:
            return str(recipe.architecture), 0, list(form.model_fields)

        raise told(error, inside or {(): lines.get(("architecture",), 1)}, name, owner, NEXT) from error


def _owner(place: Place) -> tuple[str, int, Sequence[str]]:
    if place[:1] == ("model",):
        return "model", 1, list(ShapeForm.model_fields)
    if place[:1] == ("exchange",):
        return "exchange", 1, list(ExchangeForm.model_fields)
    return "", 0, list(TrainingForm.model_fields)


def _apply(data: dict[str, Any], change: str) -> None:
    """seed=1, or model.active=2."""
    key, sign, text = change.partition("=")
    *inner, last = key.split(".")
    if not sign or not last or len(inner) >= DEEPEST or not all(inner):
        raise UsageError(f"--set '{change}' is not KEY=VALUE", "write it like steps=200 or model.active=2")
    value, _ = parsed(text.encode(), "--set")
    for part in inner:
        below = data.get(part)
        data[part] = {**below} if isinstance(below, Mapping) else {}
        data = data[part]
    data[last] = value

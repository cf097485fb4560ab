"""Checked reading of a JSON file that anybody may have written: a value of the right kind, or a CorruptError that names it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import CorruptError

REMAKE = "write it again with `moe-prism frontier` or `moe-prism skip`"
MOST_LAYERS, MOST_RANKS = 4096, 4096
"""Bounds on what a file may make us hold; no model comes near them."""


def mapping(value: object, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """An object with string keys, all of them `known` if that is given."""
    if not isinstance(value, dict):
        raise CorruptError(f"{where} must be an object with keys, not {type(value).__name__}", REMAKE)
    unknown = [key for key in value if not isinstance(key, str) or (known is not None and key not in known)]
    if unknown:
        raise CorruptError(f"{where} has the unknown key {unknown[0]!r}", REMAKE)
    return value


def get(row: dict[str, Any], key: str, where: str) -> Any:
    """row[key], which must be there."""
    if key not in row:
        raise CorruptError(f"'{key}' of {where} is missing", REMAKE)
    return row[key]


def text(row: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    """row[key], a short string."""
    value = get(row, key, where) if default is None else row.get(key, default)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise CorruptError(f"'{key}' of {where} is no name", REMAKE)
    return value


def flag(value: object, where: str) -> bool | None:
    """true, false or null."""
    if value is not None and not isinstance(value, bool):
        raise CorruptError(f"{where} is not true, false or null", REMAKE)
    return value


def number(value: object, where: str) -> float:
    """A finite number as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300 or not math.isfinite(value):
        raise CorruptError(f"{where} is no finite number", REMAKE)
    return float(value)


def numbers(value: object, where: str) -> tuple[float, ...]:
    """A list of finite numbers."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_LAYERS:
        raise CorruptError(f"{where} must be a list of numbers", REMAKE)
    return tuple(number(v, where) for v in value)


def whole_numbers(value: object, where: str) -> tuple[int, ...]:
    """A list of whole numbers."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_LAYERS or any(type(v) is not int for v in value):
        raise CorruptError(f"{where} must be a list of whole numbers", REMAKE)
    return tuple(value)


def rows(value: object, where: str) -> tuple[tuple[float, ...], ...]:
    """A list of lists of numbers."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_LAYERS:
        raise CorruptError(f"{where} must be a list of numbers per layer", REMAKE)
    if any(not isinstance(row, list) or not 0 < len(row) <= MOST_RANKS for row in value):
        raise CorruptError(f"{where} must be a list of numbers per layer", REMAKE)
    return tuple(tuple(number(v, where) for v in row) for row in value)


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """CorruptError for what would not survive a trip through JSON."""
    if depth > 32:
        raise CorruptError(f"{where} is nested too deeply", REMAKE)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CorruptError(f"key {key!r} of {where} must be str", REMAKE)
            check_plain(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CorruptError(f"{where} is not a finite number", REMAKE)
    elif not isinstance(value, str | int | float | None):
        raise CorruptError(f"{where} must be plain JSON, not {type(value).__name__}", REMAKE)

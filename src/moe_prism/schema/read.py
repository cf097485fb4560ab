"""From a file to a checked value: bounded in bytes, depth and count, and one line for whatever is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import CorruptError, PrismError, UsageError
from ..files import read_bounded

F = TypeVar("F", bound=BaseModel)
RESTORE = "restore the file from its source"
TAG = re.compile(r"(constrained-)?(int|float|str|bool)$|(list|dict)\[")
VERSIONS = ("schema", "version", "format")
SHOWN = 60  # characters of a wrong value that an error repeats

WORDS = {
    "model_type": "must be an object with keys",
    "dict_type": "must be an object with keys",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text",
    "string_pattern_mismatch": "must be of its form",
    "none_required": "must be null",
}
"""What pydantic's kinds of errors are called here; the others say themselves what they expect."""


@dataclass(frozen=True)
class JsonBounds:
    """What a JSON file may be: bytes, nesting, values and keys in all. infinite: other tools write infinity where there is no limit."""

    bytes: int = 64 << 20
    depth: int = 48
    values: int = 4_000_000
    keys: int = 1_000_000
    infinite: bool = False


def read_json(path: Path, next_step: str = RESTORE, bounds: JsonBounds = JsonBounds()) -> Any:
    """The JSON value of a file. UsageError where it cannot be read, CorruptError where it is no JSON or beyond its bounds."""
    try:
        data = read_bounded(path, bounds.bytes)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", next_step) from error
    return decode(data, str(path), next_step, bounds)


def decode(data: bytes, where: str, next_step: str = RESTORE, bounds: JsonBounds = JsonBounds()) -> Any:
    """The value of JSON text. No name may come twice in an object, and numbers are finite. CorruptError says what is wrong with it."""
    try:
        if len(data) > bounds.bytes:
            raise ValueError(f"it has {len(data)} bytes, at most {bounds.bytes} are read")
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_infinity if bounds.infinite else _no_constant
        )
        _check_bounds(value, bounds)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(str(error), 200)
        raise CorruptError(f"{where} is not JSON as it is read here: {what}", next_step) from error
    return value


def read_form(form: type[F], path: Path, next_step: str = RESTORE, bounds: JsonBounds = JsonBounds()) -> F:
    """The value of a file that must have this form."""
    return check(form, read_json(path, next_step, bounds), str(path), next_step)


def check(
    form: type[F], value: object, where: str, next_step: str = RESTORE, error: Callable[[str, str], PrismError] = CorruptError
) -> F:
    """The value in its form. The error names the place inside, what was expected there, and what stands there."""
    try:
        return form.model_validate(value)
    except ValidationError as found:
        raise error(f"{where}: {_problem(found)}", next_step) from found


def one_line(text: str, most: int = SHOWN) -> str:
    """Text that fits a line of an error: without control characters, and not too long."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def _problem(found: ValidationError) -> str:
    # one error is told, the others are counted: of a hostile file there can be many
    first, count = found.errors(include_url=False)[0], found.error_count()
    kind, path = first["type"], first["loc"]
    if kind not in ("missing", "extra_forbidden") and len(path) > 1 and TAG.match(str(path[-1])):
        path = path[:-1]  # of a choice of forms, where pydantic says which of them it means
    place = _place(path)
    if kind == "missing":
        what = f"{place} is missing"
    elif kind == "extra_forbidden":
        what = f"{place} is not known"
    elif kind == "value_error":
        what = f"{place} {first['ctx']['error']}"
    elif kind == "literal_error" and first["loc"][-1] in VERSIONS:
        what = (
            f"it has {first['loc'][-1]} {one_line(repr(_shown(first['input'])))}, this version reads {first['ctx']['expected']}"
        )
    else:
        words = WORDS.get(kind) or re.sub(r"^(\w+) should (be|have|match)", r"must \2", first["msg"])
        what = f"{place} {one_line(words, 160)}, not {one_line(repr(_shown(first['input'])))}"
    return what + (f" ({count - 1} more problems)" if count > 1 else "")


def _shown(value: object) -> object:
    """What an error repeats of a value: nothing that would take long to write."""
    if isinstance(value, dict | list | tuple):
        return type(value)()
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a number of many digits"
    return value[: SHOWN + 1] if isinstance(value, str) else value


def _place(path: tuple[int | str, ...]) -> str:
    """`points[0].kl`; the value itself where there is no path."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{one_line(part)}" if text else one_line(part)
    return f"'{text}'" if text else "it"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _infinity(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return math.inf if name == "Infinity" else -math.inf


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _check_bounds(value: Any, bounds: JsonBounds) -> None:
    """ValueError beyond the bounds, or for text that no writer could write again (half a surrogate pair)."""
    level, values, keys = [value], 0, 0
    for _ in range(bounds.depth + 1):
        below: list[Any] = []
        for item in level:
            values += 1
            if isinstance(item, dict):
                keys += len(item)
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                item.encode("utf-8")
            elif isinstance(item, float) and not math.isfinite(item) and not bounds.infinite:
                raise ValueError("a number is larger than any float")
        if values > bounds.values or keys > bounds.keys:
            raise ValueError(f"it has more than {bounds.values} values or {bounds.keys} keys")
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {bounds.depth} deep")

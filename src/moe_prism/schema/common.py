"""What forms are made of: names, counts, numbers and free JSON, each with its bounds."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from annotated_types import MaxLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

MOST_LAYERS, MOST_RANKS, MOST_BLOCKS, MOST_EXPERTS = 4096, 4096, 4096, 1 << 20
"""Bounds on what a file may make us hold; no model comes near them."""
MOST_FILES, MOST_DOCUMENTS, MOST_POINTS = 1 << 16, 1 << 20, 4096
LARGEST = 1e300
DEPTH = 4  # folders in folders that a name may lead through, itself included
PLAIN_DEPTH = 32


class Form(BaseModel):
    """A JSON object with exactly these keys; whole numbers are no truth values, and nothing is converted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def is_file_name(name: object) -> bool:
    """A plain name of a sibling file: no folder, no parent, no drive, no control character."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:\x00-\x1f]", name) and len(name) < 256


def is_inner_name(name: object) -> bool:
    """A plain name of a file in a folder or a few folders below it."""
    parts = name.split("/") if isinstance(name, str) else []
    return 0 < len(parts) <= DEPTH and all(map(is_file_name, parts))


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("must be a plain file name")
    return name


def _inner_name(name: str) -> str:
    if not is_inner_name(name):
        raise ValueError("must be the name of a file inside the folder")
    return name


def _plain(value: Any) -> Any:
    level = [value]
    for _ in range(PLAIN_DEPTH):
        if any(isinstance(v, float) and not math.isfinite(v) for v in level):
            raise ValueError("holds a number that is not finite")
        level = [item for v in level if isinstance(v, dict | list) for item in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return value
    raise ValueError("is nested too deeply")


Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f\u0085\u2028\u2029]*$")]
"""A name of one line."""
Text = Annotated[str, MaxLen(1 << 14)]
FileName = Annotated[str, AfterValidator(_file_name)]
InnerName = Annotated[str, AfterValidator(_inner_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(ge=1, lt=1 << 62)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Budget = Annotated[float, Field(gt=0, le=1)]
Experts = Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
Blocks = Annotated[int, Field(ge=1, le=MOST_BLOCKS)]
Plain = Annotated[dict[str, JsonValue], AfterValidator(_plain)]
"""Any JSON object that is not nested too deeply: settings and facts whose owner checks them."""

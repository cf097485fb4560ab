"""From the request fields `quality` and `min_quality` to levels of a folder's ladder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint import read_manifest
from ...checkpoint.shards import read_json
from ...errors import UsageError
from ...model.router import TOP_K_NAMES
from ...schedule.base import Ladder
from ..engine.ladder import TOP, climb, find_ladder
from .refusal import refusal

SECTION = "moe_prism"
OPTIONS = ("quality", "min_quality", "points")
NOT_HERE = ("ttft_ms", "tpot_ms", "class")
"""Fields of `moe-prism serve` that vLLM's scheduler cannot honour: refused, because ignoring a deadline would be worse."""


class QualityRange(NamedTuple):
    """Levels a request may be served between."""

    floor: int
    ceiling: int


@dataclass(frozen=True)
class Menu:
    """The levels of a folder and what a request gets that does not ask."""

    ladder: Ladder
    default: QualityRange

    @classmethod
    def of(cls, folder: Path, options: Mapping[str, Any] | None = None) -> Menu:
        """options: `quality` and `min_quality` for requests without their own; `points`: names of those to serve, else the Pareto set.

        UsageError for a bad one.
        """
        options = options or {}
        unknown = [key for key in options if key not in OPTIONS]
        if unknown:
            raise UsageError(f"unknown option '{unknown[0]}' of {SECTION}", f"choose from: {', '.join(OPTIONS)}")
        points = options.get("points", [])
        if not isinstance(points, list) or not all(isinstance(name, str) for name in points):
            raise UsageError(f"points of {SECTION} is no list of names", 'give one, such as ["threshold-8"]')
        ladder, _ = find_ladder(folder, full_slots(folder), refusal, points)
        ladder = ladder or climb((), 1)
        default = {key: value for key, value in options.items() if key != "points"}
        return cls(ladder, cls(ladder, QualityRange(ladder.top, ladder.top)).read(default))

    def read(self, fields: Mapping[str, Any]) -> QualityRange:
        """`quality` alone fixes the level; `min_quality` lets load lower it to there. UsageError for a value that means nothing."""
        for field in NOT_HERE:
            if field in fields:
                raise UsageError(
                    f"{field} is not available with vLLM", "leave it out, or use `moe-prism serve` without --engine vllm"
                )
        floor, ceiling = self.default
        if "quality" in fields:
            floor = ceiling = self.level(fields["quality"], "quality")
        if "min_quality" in fields:
            floor = self.level(fields["min_quality"], "min_quality")
            if "quality" in fields and floor > ceiling:
                raise UsageError("min_quality is above quality", "lower one or raise the other")
        return QualityRange(floor, max(floor, ceiling))

    def level(self, wanted: object, field: str) -> int:
        """The cheapest level of at least a quality 0..1, or the level of a name."""
        if isinstance(wanted, str):
            return self.ladder.named(wanted)
        if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not (math.isfinite(wanted) and 0 <= wanted <= 1):
            raise UsageError(f"{field} is {wanted!r}", f"give a number from 0 to 1, or a name such as '{TOP}'")
        return self.ladder.at_least(wanted)


def is_elastic(folder: Path) -> bool:
    """Whether `moe-prism refactor` wrote this folder. CorruptError if its prism.json is damaged."""
    return (folder / "prism.json").is_file() and read_manifest(folder).get("kind") == "elastic"


def full_slots(folder: Path) -> int:
    """k N of a folder, from config.json and prism.json. UsageError if the configuration does not say k."""
    config = read_json(folder / "config.json")
    for key in TOP_K_NAMES:
        if isinstance(config.get(key), int) and config[key] > 0:
            return int(config[key]) * int(read_manifest(folder)["n_sub"])
    raise UsageError(f"{folder}/config.json does not say how many experts a token uses", "serve it with `moe-prism serve`")

"""Which experts each task needs: the file of it from a calibration, and a loaded model that keeps to one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..compress.changes import change_of
from ..elastic import Elastic
from ..errors import UsageError
from ..files import replace_file
from ..methods.merge.base import routed_layers
from ..methods.prune.patterns import Patterns
from ..point import NamedPoint
from ..result import Result
from .calibrate import read_statistics

PROMPT_TOKENS = 512


@dataclass(frozen=True)
class WrittenPatterns(Result):
    """path: the file; tasks: that it holds; bytes: of the file."""

    path: Path
    tasks: tuple[str, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """What `patterns --json` prints."""
        return {"file": str(self.path), "tasks": list(self.tasks), "bytes": self.bytes}


def write_patterns(calibration: str | Path, out: str | Path) -> WrittenPatterns:
    """A file of patterns from a folder that `calibrate --collectors confidence --domain NAME=PATH ...` wrote.

    >>> import moe_prism
    >>> asked = moe_prism.CalibrateOptions(domains=["a=domains/python", "b=domains/prose"], collectors=["confidence"], tokens=512)
    >>> _ = moe_prism.calibrate_model("nano", "by-task", asked)
    >>> moe_prism.write_patterns("by-task", "patterns.json").tasks
    ('a', 'b')
    """
    found = Patterns.of(read_statistics(calibration))
    data = found.encoded()
    replace_file(Path(out), data)
    return WrittenPatterns(Path(out), tuple(found.scores), len(data))


class TaskAsked(NamedTuple):
    """task: its name, None: the one that a file of prompts is nearest to. keep: share of the experts."""

    task: str | None
    prompts: Path | None
    keep: float


def wear_pattern(model: Any, tokenizer: Any, path: Path, asked: TaskAsked) -> NamedPoint:
    """From now on a model that is loaded routes among the experts of one task. Returns what that is as an operating point.

    UsageError for another model's patterns, for a task that there is not, and for prompts of no text.
    """
    patterns, elastic = Patterns.read(path), _elastic(model)
    own = [layer.parts.layer for layer in elastic.layers]
    layers = routed_layers(model, own, [dict[str, Mapping[str, Any]]() for _ in own])
    task = asked.task
    if task is None:
        assert asked.prompts is not None
        text = asked.prompts.read_text("utf-8", errors="replace") if asked.prompts.is_file() else ""
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS]
        if not ids.numel():
            raise UsageError(f"'{asked.prompts}' is no file with text", "give prompts such as the server will be asked")
        patterns.point(next(iter(patterns.scores)), layers, asked.keep)  # whether it fits at all
        task = patterns.nearest(patterns.query(model, layers[0], ids.to(model.device)))
    named = patterns.point(task, layers, asked.keep)
    assert named.point.weights is not None
    worn = change_of(named.point.weights).installed(model, own)
    worn.__enter__()
    model._moe_prism_pattern = worn  # for as long as the model lives
    return named


def _elastic(model: Any) -> Elastic:
    found: Elastic = model._moe_prism
    return found

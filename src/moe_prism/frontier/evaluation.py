"""The record of tasks that were run at operating points: `eval.json`, beside the frontier."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..point import OperatingPoint
from ..result import Result
from ..schema import check, read_form
from ..schema.evaluation import AGAIN, EvaluationForm

FILE = "eval.json"
KIND = "evaluation"


@dataclass(frozen=True)
class Score:
    """One metric of one task. stderr: None where lm-eval has none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    questions: int


@dataclass(frozen=True)
class Evaluated:
    """An operating point and its scores."""

    name: str
    point: OperatingPoint
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Evaluation(Result):
    """Scores of every point, and on what."""

    model: str
    points: tuple[Evaluated, ...]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of `eval.json`."""
        points = [{"name": p.name, "point": p.point.to_json(), "scores": [asdict(s) for s in p.scores]} for p in self.points]
        return {"kind": KIND, "model": self.model, "points": points, "provenance": dict(self.provenance)}

    def to_records(self) -> list[dict[str, Any]]:
        """A row per point, task and metric."""
        return [{"point": point.name, **asdict(score)} for point in self.points for score in point.scores]

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read `eval.json`. CorruptError for what is none."""
        form = read_form(EvaluationForm, Path(path), AGAIN)
        points = [
            Evaluated(p.name, OperatingPoint.of_form(p.point), tuple(Score(**s.model_dump()) for s in p.scores))
            for p in form.points
        ]
        return cls(form.model, tuple(points), form.provenance)

    def encoded(self) -> bytes:
        """The bytes of its file; nothing is written that could not be read back."""
        check(EvaluationForm, self.to_json(), FILE, AGAIN)
        return (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode()


def score_rows(points: Sequence[Evaluated]) -> list[tuple[str, ...]]:
    """(task, metric, then one cell per point: value and standard error) for a table."""
    keys = list(dict.fromkeys((s.task, s.metric) for p in points for s in p.scores))
    known = {(p.name, s.task, s.metric): s for p in points for s in p.scores}
    return [(task, metric, *(score_cell(known.get((p.name, task, metric))) for p in points)) for task, metric in keys]


def score_cell(score: Score | None) -> str:
    """0.6200 ± 0.0485."""
    if score is None:
        return "-"
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")

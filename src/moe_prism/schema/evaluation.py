"""`eval.json`: scores of tasks at operating points."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen

from .common import MOST_POINTS, Count, Form, Name, Number, Plain, Text
from .points import PointForm

AGAIN = "write it again with `moe-prism eval`"


class ScoreForm(Form):
    """`Score`."""

    task: Name
    metric: Name
    value: Number
    stderr: Number | None = None
    higher_is_better: bool
    questions: Count


class EvaluatedForm(Form):
    """`Evaluated`."""

    name: Name
    point: PointForm
    scores: Annotated[list[ScoreForm], MaxLen(1 << 16)]


class EvaluationForm(Form):
    """`Evaluation`."""

    kind: Literal["evaluation"]
    model: Text
    points: Annotated[list[EvaluatedForm], MaxLen(MOST_POINTS)]
    provenance: Plain

"""What the worker tells the layers about the step being computed. One worker per process, so one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...elastic.control import Past


@dataclass
class RowState:
    """level: of every row of the batch (int64), or None when every row is at the full model (also while vLLM warms up). past: what the
    requests of the rows have had so far, where a budget is held.
    """

    level: Tensor | None = None
    past: Past | None = None


STEP = RowState()

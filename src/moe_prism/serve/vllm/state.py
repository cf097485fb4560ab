"""What the worker tells the layers about the step being computed. One worker per process, so one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowState:
    """level: of every row of the batch (int64), or None when every row is at the full model (also while vLLM warms up)."""

    level: Tensor | None = None


STEP = RowState()

"""What the worker tells the layers about the step being computed. One worker per process, so one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowState:
    """budget: one number in (0, 1] per row of the batch, or None when every row is at full budget (also while vLLM warms up)."""

    budget: Tensor | None = None


STEP = RowState()

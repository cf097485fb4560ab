"""Equal slices of neighbouring neurons, as UoE (arXiv 2503.02495) cuts an MLP; its routers are trained, ours is fitted."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...compress.split import Deal
from .base import DenseSeen, SplitMethod


class Equal(SplitMethod):
    """The first neurons always run, if any are to; the others are cut in their own order."""

    shared: ClassVar[float] = 0.0

    def deal(self, seen: DenseSeen) -> Deal:
        order = torch.arange(seen.neurons)
        return Deal(order[: seen.shared], tuple(order[seen.shared :].chunk(seen.experts)))

"""How much an expert is used, and how little a constant can stand for it. g: routing weight, o: output before it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ...compress.prune.base import Criterion, LayerSubject
from ...options.prune import ExpertForm


class Mone(Criterion):
    """MoNE (arXiv 2507.00390): standard deviation of o over routed tokens x routing weight per token of all; a constant takes its place.

    The deviation is the root of the summed variances of all channels; an expert seen fewer than twice has none and goes first.
    """

    paper = "arXiv 2507.00390"
    needs = ("means",)
    form: ClassVar[ExpertForm] = "constant"

    def scores(self, subject: LayerSubject) -> Tensor:
        found = subject.of("means")
        count = found["count"].double()
        around = found["square"].double() - found["sum"].double().square().sum(1) / count.clamp(min=1)
        spread = (around.clamp(min=0) / (count - 1).clamp(min=1)).sqrt()
        return spread * found["weight"].double() / max(1, int(found["tokens"]))

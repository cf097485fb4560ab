"""Criteria that look at what an expert puts out for the tokens routed to it. g: routing weight, o: output before it."""

from __future__ import annotations

from torch import Tensor

from ...compress.prune.base import Criterion, LayerSubject
from ...errors import UsageError


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Over routed tokens; an expert that was never chosen comes last."""
    return total.double() / count.clamp(min=1)


class GateNorm(Criterion):
    """REAP (arXiv 2510.13999): mean of g‖o‖ over routed tokens."""

    paper = "arXiv 2510.13999"
    needs = ("outputs",)

    def scores(self, subject: LayerSubject) -> Tensor:
        found = subject.of("outputs")
        return _mean(found["gated"], found["count"])


class ActivationNorm(Criterion):
    """MAN (arXiv 2606.15716): mean of ‖o‖ over routed tokens, whatever weight the router gave."""

    paper = "arXiv 2606.15716"
    needs = ("outputs",)

    def scores(self, subject: LayerSubject) -> Tensor:
        found = subject.of("outputs")
        return _mean(found["norm"], found["count"])


class EasyEp(Criterion):
    """EASY-EP (arXiv 2504.06792): sum of max(0, 1 - cos(h, h + y)) g‖o‖, h the residual stream, y the layer's routed output."""

    paper = "arXiv 2504.06792"
    needs = ("outputs",)

    def scores(self, subject: LayerSubject) -> Tensor:
        found = subject.of("outputs")
        if not int(found["residual_tokens"]):
            raise UsageError(f"the residual stream of '{subject.name}' was not seen", "use --criterion gate-norm")
        return found["easy"].double()


class Energy(Criterion):
    """Sum of g²‖o‖² over routed tokens: the squared error of the layer if nothing took the expert's place."""

    needs = ("outputs",)

    def scores(self, subject: LayerSubject) -> Tensor:
        return subject.of("outputs")["gated_sq"].double()

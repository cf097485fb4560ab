"""Wanda with OWL's budgets, as STUN uses both (arXiv 2409.06211), made structured: a neuron goes as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import LayerSeen, NeuronMethod, NeuronParameters

OUTLIER = 5.0  # times a layer's mean score of a weight
BAND = 0.08  # how far a layer's share may be from the mean


@dataclass(frozen=True, kw_only=True)
class WandaParameters(NeuronParameters):
    """owl: whether layers with more outliers keep more; else all keep the same share."""

    owl: bool = True


class Wanda(NeuronMethod):
    """The sum over a neuron's column d of W_down of |d_i| √Σa²: Wanda's score of its weights. One ranking per layer.

    Wanda removes single weights, which saves memory in a sparse format only. OWL counts the weights whose score is more than OUTLIER
    times their layer's mean, and gives layers shares in a band of BAND to both sides. The two numbers are OWL's usual ones.
    """

    needs = ("activations of each neuron",)
    paper = "arXiv 2409.06211"
    collectors = ("neurons",)
    Parameters = WandaParameters
    parameters: WandaParameters

    def scores(self, seen: LayerSeen) -> Tensor:
        return seen.layer.down.detach().abs().double().sum(1).cpu() * self._norms(seen)

    def evidence(self, seen: LayerSeen) -> float:
        """The share of outliers among a layer's weights of W_down."""
        norms = self._norms(seen).float()
        each = [seen.layer.down[e].detach().abs().float().cpu() * norms[e] for e in range(len(norms))]
        limit = OUTLIER * sum(float(own.mean()) for own in each) / len(each)
        return sum(float((own > limit).float().mean()) for own in each) / len(each)

    def shares(self, evidence: Sequence[float], keep: float) -> tuple[float, ...] | None:
        span = max(evidence) - min(evidence)
        if not self.parameters.owl or span <= 0:
            return None
        room = min(BAND, keep, 1 - keep)  # nothing below none or above all
        own = [2 * room * (one - min(evidence)) / span for one in evidence]
        middle = sum(own) / len(own)
        return tuple(min(1.0, max(1e-6, keep + one - middle)) for one in own)

    @staticmethod
    def _norms(seen: LayerSeen) -> Tensor:
        """[E, f]: √Σa² over routed tokens."""
        return seen.of("neurons")["sq"].double().sqrt()

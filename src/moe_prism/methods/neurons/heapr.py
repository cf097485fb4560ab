"""HEAPr: a neuron's part of the loss to second order (arXiv 2509.22299), from its formula alone.

The published score is E[a²] dᵀ E[g gᵀ] d, with a the neuron's activation, d its column of W_down and g the gradient at its expert's output,
means over the tokens that chose the expert. Since ∂L/∂a = dᵀ g it is E[a²] E[(∂L/∂a)²], which needs no d x d matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import UsageError
from .base import LayerSeen, NeuronMethod, NeuronParameters

WAYS = ("means", "tokens")


@dataclass(frozen=True, kw_only=True)
class HeaprParameters(NeuronParameters):
    """by: `means`, the product of two means as published, or `tokens`, E[(a ∂L/∂a)²]. total: times the share of tokens that choose the
    expert, which is what the loss would rise by; as published an expert counts as if every token chose it.
    """

    by: str = "means"
    total: bool = False


class Heapr(NeuronMethod):
    """One ranking of all neurons of the model."""

    needs = ("activations and gradients of each neuron",)
    paper = "arXiv 2509.22299"
    collectors = ("neurons", "gradients")
    scope = "model"
    Parameters = HeaprParameters
    parameters: HeaprParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> HeaprParameters:
        found: HeaprParameters = super().read_argument(name, text)
        if found.by not in WAYS:
            raise UsageError(f"'{name}' has no by={found.by}", f"write one of: {', '.join(f'by={way}' for way in WAYS)}")
        return found

    def scores(self, seen: LayerSeen) -> Tensor:
        if self.parameters.by == "tokens":
            found = seen.mean("gradients", "product_sq")
        else:
            found = seen.mean("neurons", "sq") * seen.mean("gradients", "slope_sq")
        if self.parameters.total:
            values = seen.of("neurons")
            found = found * (values["count"].double() / values["tokens"].double())[:, None]
        return found

"""SlimMoE: what the loss feels of a neuron to first order, and equally narrow experts (arXiv 2506.18349)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import LayerSeen, NeuronMethod, NeuronParameters


@dataclass(frozen=True, kw_only=True)
class SlimParameters(NeuronParameters):
    """signed: whether what tokens say may cancel, |Σ a ∂L/∂a| as published; else Σ|a ∂L/∂a|."""

    signed: bool = True


class Slim(NeuronMethod):
    """|Σ w ∂L/∂w| over the weights w of a neuron's column of W_down, which is |Σ a ∂L/∂a| over tokens.

    L is the loss of the next token. The paper's, distillation from the model itself, has no slope where the two are equal. It also distils
    between cuts, which is not done here.
    """

    needs = ("gradients of each neuron",)
    paper = "arXiv 2506.18349"
    collectors = ("gradients",)
    scope = "expert"
    Parameters = SlimParameters
    parameters: SlimParameters

    def scores(self, seen: LayerSeen) -> Tensor:
        found = seen.of("gradients")
        return found["product"].double().abs() if self.parameters.signed else found["product_abs"].double()

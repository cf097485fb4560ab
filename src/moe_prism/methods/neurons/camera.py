"""CAMERA-P: the energy that a neuron puts into its layer's output (arXiv 2508.02322)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from .base import LayerSeen, NeuronMethod, NeuronParameters


@dataclass(frozen=True, kw_only=True)
class CameraParameters(NeuronParameters):
    """alpha: from 0, the sum over tokens, to 1, the largest of one token."""

    alpha: float = 0.9


class CameraP(NeuronMethod):
    """((1 - alpha) Σ(ga)² + alpha max(ga)²) ‖d‖², one ranking per layer; g is the routing weight, d the column of W_down.

    With alpha = 0 it is the squared error of the layer's output without the neuron. All layers are scored on the unedited model, the
    authors' code scores a layer on the edited ones before it.
    """

    needs = ("activations of each neuron",)
    paper = "arXiv 2508.02322"
    collectors = ("neurons",)
    Parameters = CameraParameters
    parameters: CameraParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> CameraParameters:
        found: CameraParameters = super().read_argument(name, text)
        if not 0 <= found.alpha <= 1:
            raise UsageError(f"alpha={found.alpha:g} of '{name}' is outside 0 to 1", "write alpha=0.9, as published")
        return found

    def scores(self, seen: LayerSeen) -> Tensor:
        values, alpha = seen.of("neurons"), self.parameters.alpha
        energy = (1 - alpha) * values["gated_sq"].double() + alpha * values["gated_max"].double().square()
        return energy * column_norms(seen).square()


def column_norms(seen: LayerSeen) -> Tensor:
    """[E, f] (float64): ‖d‖ of every neuron."""
    found: Tensor = torch.linalg.vector_norm(seen.layer.down.detach().double(), dim=1)
    return found.cpu()

"""The size of a neuron's weights: what reads no text."""

from __future__ import annotations

from torch import Tensor

from .base import LayerSeen, NeuronMethod
from .camera import column_norms


class Magnitude(NeuronMethod):
    """‖gate row‖ ‖up row‖ ‖down column‖, one ranking per layer; without a gate, of the other two."""

    def scores(self, seen: LayerSeen) -> Tensor:
        found, layer = column_norms(seen), seen.layer
        for rows in (layer.gate, layer.up):
            if rows is not None:
                found = found * rows.detach().double().norm(dim=2).cpu()
        return found

"""A uniform draw of neurons: the baseline every ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerSeen, NeuronMethod, NeuronParameters


@dataclass(frozen=True, kw_only=True)
class RandomParameters(NeuronParameters):
    """seed: of the draw."""

    seed: int = 0


class RandomNeurons(NeuronMethod):
    """Every layer draws for itself; the draws of all shares are nested."""

    Parameters = RandomParameters
    parameters: RandomParameters

    def scores(self, seen: LayerSeen) -> Tensor:
        generator = torch.Generator().manual_seed(self.parameters.seed * 100_003 + seen.layer.index)
        return torch.rand(seen.layer.num_experts, seen.layer.width, generator=generator, dtype=torch.float64)

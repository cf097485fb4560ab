"""Single weights that are zeros, by Wanda's score, as a change of weights. Shapes: E experts, f neurons each, d hidden."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import CorruptError, UsageError
from ..model import MoELayer
from ..schema import check
from ..schema.points import REMAKE, SparseForm
from .edit import Edit
from .quantize.decoded import matrices

WHERE = "settings of the weight change 'sparse'"
PLACE_BYTES = 1 / 8
"""Of every weight, zero or not: a bit that says which it is."""
WEIGHT_BYTES = 2
"""Of a weight in `resident_share`, which knows no model."""


@dataclass(frozen=True)
class SparseLayer:
    """density: share of the weights that stay. inputs [E, d], middle [E, f]: norms (float16) of what gate and up, and what down, read."""

    experts: int
    density: float
    inputs: bytes
    middle: bytes

    @classmethod
    def of(cls, density: float, inputs: Tensor, middle: Tensor) -> SparseLayer:
        """Norms in whatever unit an expert has; only their ratios count."""
        return cls(len(inputs), density, _packed(inputs), _packed(middle))

    def norms(self) -> tuple[Tensor, Tensor]:
        """([E, d], [E, f])."""
        found = [torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float32)) for data in (self.inputs, self.middle)]
        return found[0].view(self.experts, -1), found[1].view(self.experts, -1)


def _packed(norms: Tensor) -> bytes:
    """Of every expert in its own largest, so that float16 holds them."""
    size = norms.double() / norms.double().amax(1, keepdim=True).clamp(min=1e-300)
    return size.numpy().astype("<f2").tobytes()


@dataclass(frozen=True)
class SparseChange(Edit):
    """Of every row of every matrix the weights with the largest |w| x norm of what they read stay."""

    layers: tuple[SparseLayer, ...]
    name: ClassVar[str] = "sparse"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SparseChange:
        found = []
        for row in check(SparseForm, settings, WHERE, REMAKE).layers:
            try:
                data = [base64.b64decode(text, validate=True) for text in (row.inputs, row.middle)]
            except ValueError as error:
                raise CorruptError(f"{WHERE}: norms are no base64", REMAKE) from error
            if any(len(own) % (2 * row.experts) or not len(own) for own in data):
                raise CorruptError(f"{WHERE}: norms are not those of {row.experts} experts", REMAKE)
            if any(not np.isfinite(np.frombuffer(own, "<f2")).all() for own in data):
                raise CorruptError(f"{WHERE}: a norm is not finite", REMAKE)
            found.append(SparseLayer(row.experts, row.density, *data))
        return cls(tuple(found))

    def settings(self) -> dict[str, Any]:
        return {
            "layers": [
                {
                    "experts": own.experts,
                    "density": own.density,
                    "inputs": base64.b64encode(own.inputs).decode(),
                    "middle": base64.b64encode(own.middle).decode(),
                }
                for own in self.layers
            ]
        }

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        mine = [tuple(own.shape for own in one.norms()) for one in self.layers]
        if mine != [((x.num_experts, x.hidden), (x.num_experts, x.width)) for x in layers]:
            raise UsageError("the weights that stay are of a model with other experts", REMAKE)

    def changes(self, number: int) -> bool:
        return self.layers[number].density < 1

    @torch.no_grad()
    def edit(self, number: int, layer: MoELayer) -> None:
        own = self.layers[number]
        inputs, middle = own.norms()
        for matrix in matrices(layer):
            norms = middle if matrix.shape[2] == layer.width and matrix.data_ptr() == layer.down.data_ptr() else inputs
            stay = round(own.density * matrix.shape[2])
            for e in range(own.experts):
                score = matrix[e].float().abs() * norms[e].to(matrix.device)
                gone = score.argsort(dim=1, descending=True, stable=True)[:, stay:]
                matrix[e] = matrix[e].scatter(1, gone, 0)

    @property
    def resident_share(self) -> float:
        """Of weights of 16 bits, in a form that stores no zeros."""
        return min(1.0, sum(own.density + PLACE_BYTES / WEIGHT_BYTES for own in self.layers) / len(self.layers))

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor:
        own = self.layers[layer]
        size = stored if own.density == 1 else stored * own.density + PLACE_BYTES
        return torch.full((own.experts,), size, dtype=torch.float64)

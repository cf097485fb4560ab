"""Experts that share one set of weights, written as two thin matrices in a space that fits all of them, as a change of weights.

Shapes: E experts, f neurons each, d hidden, r the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, SubspaceForm
from ..edit import Edit
from ..quantize.decoded import matrices
from .change import MergeChange, merge

WHERE = "settings of the weight change 'subspace'"


@dataclass(frozen=True)
class SubspaceChange(Edit):
    """Merged experts of rank `rank`. hidden: d; scales: of every layer what the channels of its input count [d]; none: all alike. whole: of
    every layer the experts whose rank stays; none: of no layer any.

    The members of a group share the basis of their inputs (of gate and up) and of their outputs (of down): the r directions in which all of
    them together are largest. The mean of the group is kept in these directions.
    """

    merged: MergeChange
    hidden: int
    rank: int
    scales: tuple[tuple[float, ...], ...] = ()
    whole: tuple[tuple[int, ...], ...] = ()
    name: ClassVar[str] = "subspace"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SubspaceChange:
        form = check(SubspaceForm, settings, WHERE, REMAKE)
        scales = tuple(map(tuple, form.scales))
        if scales and (len(scales) != len(form.layers) or any(len(row) != form.hidden for row in scales)):
            raise CorruptError(f"{WHERE}: the scales are not those of {len(form.layers)} layers of {form.hidden}", REMAKE)
        whole = tuple(map(tuple, form.whole))
        if whole and len(whole) != len(form.layers):
            raise CorruptError(f"{WHERE}: it says of {len(whole)} of {len(form.layers)} layers which experts stay whole", REMAKE)
        return cls(MergeChange.from_settings({"layers": settings["layers"]}), form.hidden, form.rank, scales, whole)

    def settings(self) -> dict[str, Any]:
        scales = [list(row) for row in self.scales]
        return {
            **self.merged.settings(),
            "hidden": self.hidden,
            "rank": self.rank,
            "scales": scales,
            "whole": list(map(list, self.whole)),
        }

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        self.merged.check_fits(layers)
        if any(layer.hidden != self.hidden or self.rank > min(layer.hidden, layer.width) for layer in layers):
            raise UsageError(f"experts of this model have no {self.rank} directions of {self.hidden} channels", REMAKE)

    def changes(self, number: int) -> bool:
        return True

    @property
    def resident_share(self) -> float:
        held = 0.0
        for number, own in enumerate(self.merged.layers):
            thin = self.rank * (self.hidden + own.neurons) / (self.hidden * own.neurons)
            held += own.neurons * sum(1.0 if g in self._whole(number) else thin for g in set(own.groups))
        return held / sum(len(own.groups) * own.neurons for own in self.merged.layers)

    def same_weights(self, layers: Sequence[MoELayer], layer: int) -> Tensor:
        return self.merged.same_weights(layers, layer)

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor:
        d, f = layers[layer].hidden, layers[layer].width
        found = torch.full((layers[layer].num_experts,), stored * self.rank * (d + f) / (d * f), dtype=torch.float64)
        found[list(self._whole(layer))] = stored
        return found

    def _whole(self, number: int) -> tuple[int, ...]:
        return self.whole[number] if self.whole else ()

    @torch.no_grad()
    def edit(self, number: int, layer: MoELayer) -> None:
        choice = self.merged.layers[number]
        groups = [own for own in choice.members() if own[0] not in self._whole(number)]
        last = len(matrices(layer)) - 1
        scale = torch.ones(layer.hidden).double()
        if self.scales:
            scale = torch.tensor(self.scales[number], dtype=torch.float64)
        bases = [
            [joint_basis(matrix[own].double().cpu() * (1 if i == last else scale), i == last, self.rank) for own in groups]
            for i, matrix in enumerate(matrices(layer))
        ]
        merge(layer, choice)
        for i, matrix in enumerate(matrices(layer)):
            for own, v in zip(groups, bases[i], strict=True):
                mean = matrix[own[0]].double().cpu()
                thin = v @ (v.T @ mean) if i == last else (mean * scale) @ v @ v.T / scale
                matrix[own] = thin.to(matrix)


def joint_basis(several: Tensor, outputs: bool, rank: int) -> Tensor:
    """[i, r]: the right singular vectors of matrices [n, o, i] one below the other; outputs: [o, r], the left ones side by side."""
    gram = torch.einsum("noi,npi->op", several, several) if outputs else torch.einsum("noi,noj->ij", several, several)
    found: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    return found

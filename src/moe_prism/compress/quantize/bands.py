"""Experts whose neurons have widths of their own: a neuron's rows of gate and up and its column of down are stored in the same bits.

The neurons of an expert are put in order by their width, widest first. Each width is then a band: plain rows of gate and up, and plain
columns of down with groups among the band's own neurons. The order is exact, so nothing but rounding changes an output.
Shapes: E experts, f neurons, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, BandsForm
from ..changes import Change
from ..codec import Codec, Planes
from .change import codec_of
from .decoded import SOURCE, matrices, replaced

WHERE = "settings of the weight change 'bands'"
Neurons = tuple[tuple[str, ...], ...]
"""Per MoE layer and expert a digit for each neuron: its bits."""


class Band(NamedTuple):
    """The neurons of a layer at one width. rows: which of gate, where there is one, and of up, [E f, d], counted through all experts;
    columns [E, F]: which of down, -1 where there is none.
    """

    rows: tuple[Tensor, ...]
    columns: Tensor
    planes: tuple[Planes, ...]

    @property
    def bytes(self) -> int:
        return sum(planes.bytes(planes.widths[-1]) for planes in self.planes)

    def write(self, matrices: Sequence[Tensor], codec: Codec) -> None:
        """Every neuron where it was."""
        *first, down = (codec.decode(planes, planes.widths[-1]) for planes in self.planes)
        *into, last = matrices
        for matrix, rows, values in zip(into, self.rows, first, strict=True):
            matrix[rows // matrix.shape[1], rows % matrix.shape[1]] = values.to(matrix)
        expert, place = torch.where(self.columns >= 0)
        last.transpose(1, 2)[expert, self.columns[expert, place]] = down.transpose(1, 2)[expert, place].to(last)


def bands(weights: Sequence[Tensor], widths: Sequence[Tensor], codec: Codec, group: int) -> tuple[Band, ...]:
    """Of gate, where there is one, up [E, f, d] and down [E, d, f]. widths [E, f] of each of them: all the same but to compare with."""
    found = []
    for bits in sorted({float(b) for own in widths for b in torch.unique(own)}):
        *rows, _ = (torch.where(own.flatten() == bits)[0] for own in widths)
        columns = _columns(widths[-1] == bits)
        down = weights[-1].transpose(1, 2)
        padded = torch.where(
            (columns >= 0)[..., None], down.gather(1, columns.clamp(0)[..., None].expand(-1, -1, down.shape[2])), 0
        )
        planes = [codec.encode(w.flatten(0, 1)[own], bits, group) for w, own in zip(weights[:-1], rows, strict=True)]
        found.append(Band(tuple(rows), columns, (*planes, codec.encode(padded.transpose(1, 2), bits, group))))
    return tuple(found)


def _columns(marks: Tensor) -> Tensor:
    """[E, F]: the marked neurons of each expert in order, filled up with -1."""
    order = (~marks).int().argsort(dim=1, stable=True)
    kept = torch.arange(marks.shape[1]) < marks.sum(1, keepdim=True)
    return torch.where(kept, order, -1)[:, : int(marks.sum(1).max())]


@dataclass(frozen=True)
class BandChange(Change):
    """neurons: the bits of every neuron; group: inputs that share a scale."""

    codec: Codec
    neurons: Neurons
    group: int
    name: ClassVar[str] = "bands"
    touches_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for bits in {digit for row in self.neurons for expert in row for digit in expert}:
            self.codec.check(float(bits), self.group)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> BandChange:
        form = check(BandsForm, settings, WHERE, REMAKE)
        if any(not expert.isdecimal() or not expert.isascii() for row in form.neurons for expert in row):
            raise CorruptError(f"{WHERE}: the bits of neurons are no digits", REMAKE)
        return cls(codec_of(form), tuple(map(tuple, form.neurons)), form.group)

    def settings(self) -> dict[str, Any]:
        neurons = [list(row) for row in self.neurons]
        return {"codec": self.codec.name, "options": asdict(self.codec), "neurons": neurons, "group": self.group}

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        each = self.widths(layers)

        def encode() -> tuple[tuple[Band, ...], ...]:
            found = []
            for layer, widths in zip(layers, each, strict=True):
                own = matrices(layer)
                found.append(bands(own, [widths] * len(own), self.codec, self.group))
            return tuple(found)

        return replaced(model, layers, self.codec, (self.codec, self.group, self.neurons), encode)

    @property
    def resident_share(self) -> float:
        """By the bits alone; what scales take, `bytes_per_weight` says."""
        digits = [int(digit) for row in self.neurons for expert in row for digit in expert]
        return sum(digits) / len(digits) / SOURCE

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor:
        found, own = self.widths(layers)[layer], layers[layer]
        rows = 2 if own.gate is not None else 1
        sizes = torch.zeros(len(found), dtype=torch.float64)
        for bits in torch.unique(found).tolist():
            for e, count in enumerate((found == bits).sum(1).tolist()):
                if count:
                    down = self.codec.bytes((own.hidden, count), bits, self.group)
                    sizes[e] += rows * self.codec.bytes((count, own.hidden), bits, self.group) + down
        return sizes / ((rows + 1) * own.hidden * own.width)

    def widths(self, layers: Sequence[MoELayer]) -> list[Tensor]:
        """[E, f]: the bits of every neuron of every layer. UsageError for another model's."""
        shapes = [(len(row), {len(expert) for expert in row}) for row in self.neurons]
        if shapes != [(layer.num_experts, {layer.width}) for layer in layers]:
            raise UsageError("the bits of the neurons are not those of this model", REMAKE)
        return [torch.tensor([[float(digit) for digit in expert] for expert in row]) for row in self.neurons]

"""Experts stored by a codec, as a change of weights: a width for all of them, for each layer, or for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, BandsForm, QuantizeForm
from ..codec import Codec, codecs
from ..edit import Edit
from .decoded import GONE, SOURCE, decoded, matrices, parts_of

WHERE = "settings of the weight change 'quantize'"
Widths = tuple[tuple[float, ...], ...]
"""Per MoE layer the bits of all its experts, or of each."""


@dataclass(frozen=True)
class QuantizeChange(Edit):
    """Every expert as a codec gives it back.

    bits: of all, or `Widths`; 0: the expert is not stored and puts out nothing, 16: it stays as it is. group: inputs that share a scale.
    """

    codec: Codec
    bits: float | Widths
    group: int
    name: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        for bits in {bits for row in self._rows(1) for bits in row}:
            if bits not in (GONE, SOURCE):
                self.codec.check(bits, self.group)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> QuantizeChange:
        form = check(QuantizeForm, settings, WHERE, REMAKE)
        return cls(codec_of(form), widths_of(form), form.group)

    def settings(self) -> dict[str, Any]:
        bits = [list(row) for row in self.bits] if isinstance(self.bits, tuple) else self.bits
        return {"codec": self.codec.name, "options": asdict(self.codec), "bits": bits, "group": self.group}

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        return decoded(model, layers, self.codec, self.group, self.widths(layers))

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        self.widths(layers)

    def changes(self, number: int) -> bool:
        return any(bits != SOURCE for bits in self._rows(number + 1)[number])

    @torch.no_grad()
    def edit(self, number: int, layer: MoELayer) -> None:
        row = self._rows(number + 1)[number]
        for part in parts_of(layer, self.codec, self.group, row * (layer.num_experts // len(row)), None):
            part.write(matrices(layer), self.codec)

    @property
    def resident_share(self) -> float:
        """By the bits alone; what scales take, `bytes_per_weight` says."""
        rows = self._rows(1)
        return sum(min(bits / SOURCE, 1.0) for row in rows for bits in row) / sum(len(row) for row in rows)

    def widths(self, layers: Sequence[MoELayer]) -> Widths:
        """The bits of every expert. UsageError for another model's."""
        rows = self._rows(len(layers))
        if len(rows) != len(layers) or any(
            len(row) not in (1, layer.num_experts) for row, layer in zip(rows, layers, strict=True)
        ):
            raise UsageError(
                f"the bits are for {len(rows)} layers of {max(map(len, rows))} experts, the model has {len(layers)} layers "
                f"of {layers[0].num_experts}",
                REMAKE,
            )
        return tuple(row * (layer.num_experts // len(row)) for row, layer in zip(rows, layers, strict=True))

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor:
        shapes = [tuple(matrix.shape[1:]) for matrix in matrices(layers[layer])]
        weights = sum(torch.Size(shape).numel() for shape in shapes)
        widths = self.widths(layers)[layer]
        known = {GONE: 0.0, SOURCE: stored}
        for bits in set(widths) - set(known):
            known[bits] = sum(self.codec.bytes(shape, bits, self.group) for shape in shapes) / weights
        return torch.tensor([known[bits] for bits in widths], dtype=torch.float64)

    def _rows(self, layers: int) -> Widths:
        return self.bits if isinstance(self.bits, tuple) else ((self.bits,),) * layers


def widths_of(form: QuantizeForm) -> float | Widths:
    """The bits that settings say: of all experts, or per layer of all its experts or of each."""
    if not isinstance(form.bits, list):
        return form.bits
    return tuple(tuple(own) if isinstance(own, list) else (own,) for own in form.bits)


def codec_of(form: QuantizeForm | BandsForm) -> Codec:
    """The codec that settings name. CorruptError for options that it does not have."""
    kind = codecs.get(form.codec)
    known = {f.name: type(f.default) for f in fields(kind)}
    for name, value in form.options.items():
        if name not in known or type(value) is not known[name]:
            raise CorruptError(f"codec '{kind.name}' takes no option '{name}' of {value!r}", REMAKE)
    options: dict[str, Any] = dict(form.options)
    return kind(**options)

"""Run a model with its experts as a codec gives them back; the weights are as they were afterwards, to the bit.

What was encoded is kept beside the model, so that entering again decodes and does not encode. Shapes: E experts, f neurons, d hidden.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...model import MoELayer
from ..codec import Codec, Planes

GONE, SOURCE = 0.0, 16.0
"""Bits of an expert that is not stored, and of one that stays as it is."""
KEPT_BYTES = 1 << 30
"""Of encoded models that are kept, or what the model's experts take if that is more: a frontier goes round them once per batch."""
TOGETHER = 1 << 24
"""Bytes of a matrix's experts that are encoded at a time: the search for a scale takes five times what it looks at."""
_NAME = "_moe_prism_encoded"


class Part(Protocol):
    """Weights of a layer that were encoded together."""

    @property
    def bytes(self) -> int: ...

    def write(self, matrices: Sequence[Tensor], codec: Codec) -> None:
        """Put what decoding gives in the place of the weights."""


class ExpertPart(NamedTuple):
    """Experts of a layer that have one width: planes of every matrix, none where there are no bits."""

    experts: Tensor
    planes: tuple[Planes, ...]

    @property
    def bytes(self) -> int:
        return sum(planes.bytes(planes.widths[-1]) for planes in self.planes)

    def write(self, matrices: Sequence[Tensor], codec: Codec) -> None:
        """Of every matrix the experts of this width."""
        for number, matrix in enumerate(matrices):
            if not self.planes:
                matrix[self.experts] = 0
                continue
            planes = self.planes[number]
            matrix[self.experts] = codec.decode(planes, planes.widths[-1]).to(matrix)


class ScaledPart(NamedTuple):
    """The experts of a layer that stay in their own type, with their inputs' factors [d] on gate and up."""

    experts: Tensor
    scale: Tensor

    @property
    def bytes(self) -> int:
        return self.scale.nbytes

    def write(self, matrices: Sequence[Tensor], codec: Codec) -> None:
        """On the matrices that read the layer's input."""
        for matrix in matrices[:-1]:
            matrix[self.experts] *= self.scale.to(matrix)


class Encoded(NamedTuple):
    """state: of the weights that were encoded; layers: the parts of each, stored by a codec."""

    state: tuple[int, ...]
    codec: Codec
    layers: tuple[tuple[Part, ...], ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for parts in self.layers for part in parts)


def matrices(layer: MoELayer) -> list[Tensor]:
    """gate (where there is one) and up [E, f, d], down [E, d, f]: what a codec stores, a group along the inputs of each."""
    return [w.detach() for w in (layer.gate, layer.up, layer.down) if w is not None]


def decoded(
    model: Any,
    layers: Sequence[MoELayer],
    codec: Codec,
    group: int,
    widths: Sequence[Sequence[float]],
    scales: Sequence[Tensor] = (),
) -> AbstractContextManager[Encoded]:
    """Inside the block every expert is what decoding gives. widths [L][E]: bits, GONE and SOURCE as said there.

    scales: per layer what gate and up are multiplied by [d] before they are encoded, where they are.
    """

    def encode() -> Layers:
        factors: Sequence[Tensor | None] = scales or [None] * len(layers)
        return tuple(parts_of(layer, codec, group, own, scale) for layer, own, scale in zip(layers, widths, factors, strict=True))

    key = codec, group, tuple(map(tuple, widths)), tuple(tuple(own.tolist()) for own in scales)
    return replaced(model, layers, codec, key, encode)


Layers = tuple[tuple[Part, ...], ...]


@contextmanager
@torch.no_grad()
def replaced(
    model: Any, layers: Sequence[MoELayer], codec: Codec, key: Hashable, encode: Callable[[], Layers]
) -> Iterator[Encoded]:
    """Inside the block the weights are what decoding gives of `encode`, which is called once per key while the weights stay.

    Yields what was encoded.
    """
    found = _encoded(model, layers, codec, key, encode)
    with encodings_hold(model, layers):
        saved = [[matrix.clone() for matrix in matrices(layer)] for layer in layers]
        try:
            for layer, parts in zip(layers, found.layers, strict=True):
                for part in parts:
                    part.write(matrices(layer), codec)
            yield found
        finally:
            for layer, own in zip(layers, saved, strict=True):
                for matrix, before in zip(matrices(layer), own, strict=True):
                    matrix.copy_(before)


@contextmanager
def encodings_hold(model: Any, layers: Sequence[MoELayer]) -> Iterator[None]:
    """What was encoded of the weights holds on after the block, which leaves them as they were."""
    before = weights_state(layers)
    try:
        yield
    finally:
        encodings_move(model, before, weights_state(layers))


def _encoded(model: Any, layers: Sequence[MoELayer], codec: Codec, key: Hashable, encode: Callable[[], Layers]) -> Encoded:
    """From what is kept beside the model, where its weights have not changed since."""
    kept: OrderedDict[Any, Encoded] = model.__dict__.setdefault(_NAME, OrderedDict())
    state = weights_state(layers)
    if key not in kept or kept[key].state != state:
        kept[key] = Encoded(state, codec, encode())
        kept.move_to_end(key)
        limit = max(KEPT_BYTES, sum(w.numel() * w.element_size() for layer in layers for w in matrices(layer)))
        while len(kept) > 1 and sum(encoded.bytes for encoded in kept.values()) > limit:
            kept.popitem(last=False)
    return kept[key]


def parts_of(layer: MoELayer, codec: Codec, group: int, widths: Sequence[float], scale: Tensor | None) -> tuple[Part, ...]:
    """An expert's planes, by the bits of each; scale: what gate and up are multiplied by before, where they are."""
    *first, down = matrices(layer)
    found: list[Part] = []
    few = max(1, TOGETHER // (4 * layer.hidden * layer.width))
    for bits in sorted(set(widths)):
        every = torch.tensor([e for e, own in enumerate(widths) if own == bits], device=layer.up.device)
        if bits == SOURCE:
            found += [] if scale is None else [ScaledPart(every, scale)]
            continue
        for experts in torch.split(every, few):
            own = [w[experts] if scale is None else w[experts] * scale.to(w) for w in first]
            planes = [] if bits == GONE else [codec.encode(matrix, bits, group) for matrix in (*own, down[experts])]
            found.append(ExpertPart(experts, tuple(planes)))
    return tuple(found)


def encodings_move(model: Any, before: tuple[int, ...], now: tuple[int, ...]) -> None:
    """What was encoded of the weights in one state holds for those in another: they are the same."""
    kept = model.__dict__.get(_NAME, {})
    for key, encoded in kept.items():
        if encoded.state == before:
            kept[key] = encoded._replace(state=now)


def weights_state(layers: Sequence[MoELayer]) -> tuple[int, ...]:
    """Another one as soon as anybody has written to the weights or moved them."""
    weights = [matrix for layer in layers for matrix in matrices(layer)]
    return tuple(number for w in weights for number in (w.data_ptr(), 0 if w.is_inference() else w._version))

"""Whether two models have the same neurons in the same order, however their weights were rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..artefact.source import Weights
from ..errors import UsageError
from ..model import MoELayer

ROWS = 64  # neurons per expert that are compared with all others, spread evenly
LEAST = 0.9  # cosine of a neuron with itself: 4 bits give .99 and more, 3 bits .97; another neuron is near 0
SAME = 0.02  # relative: what vectors that nobody quantizes, like norms, may differ by
NEXT = "quantize the folder that --from names, and change neither order nor scale of its weights"


class Likeness(NamedTuple):
    """Cosine of each neuron's weights with themselves: the mean over all, and the least."""

    mean: float
    least: float


def same_order(quantized: Weights, elastic: Weights) -> Likeness:
    """UsageError naming the layer, expert and neuron if `quantized` is not `elastic` with its weights rounded."""
    _check_shapes(quantized.layers, elastic.layers)
    _check_vectors(quantized, elastic)
    total, count, least = 0.0, 0, 1.0
    for one, two in zip(quantized.layers, elastic.layers, strict=True):
        with quantized.loaded(one), elastic.loaded(two):
            for expert in range(one.num_experts):
                for mine, theirs in zip(_matrices(one, expert), _matrices(two, expert), strict=True):
                    alike = _check_expert(mine, theirs, f"expert {expert} of '{one.name}'")
                    total, count, least = total + float(alike.sum()), count + len(alike), min(least, float(alike.min()))
    return Likeness(total / count, least)


def _matrices(layer: MoELayer, expert: int) -> Iterator[Tensor]:
    """What a neuron reads and what it writes, a unit row [f, d] for each, in float32."""
    found = (layer.up[expert], layer.down[expert].T) if layer.gate is None else (
        layer.gate[expert], layer.up[expert], layer.down[expert].T,
    )  # fmt: skip
    for each in found:
        yield torch.nn.functional.normalize(each.float(), dim=1)


def _check_expert(mine: Tensor, theirs: Tensor, where: str) -> Tensor:
    """Cosines [f] of neurons with themselves. A neuron of zeros is like itself."""
    alike = (mine * theirs).sum(1)
    alike[theirs.square().sum(1) < 0.5] = 1.0
    places = torch.arange(0, len(mine), max(1, len(mine) // ROWS))
    nearest = (mine[places] @ theirs.T).argmax(1)
    elsewhere = (nearest != places) & (alike[places] < LEAST)
    if elsewhere.any():
        at = int(elsewhere.int().argmax())
        raise UsageError(f"neuron {int(places[at])} of {where} is neuron {int(nearest[at])} of the elastic folder", NEXT)
    if float(alike.min()) < LEAST:
        at = int(alike.argmin())
        raise UsageError(
            f"neuron {at} of {where} is like that of the elastic folder by a cosine of {float(alike[at]):.2f} only", NEXT
        )
    return alike


def _check_shapes(quantized: Sequence[MoELayer], elastic: Sequence[MoELayer]) -> None:
    mine, theirs = ([(layer.num_experts, layer.width, layer.hidden) for layer in layers] for layers in (quantized, elastic))
    if mine != theirs:
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        what = f"{len(mine)} layers, not {len(theirs)}"
        if at is not None:
            what = f"{mine[at]} experts, width and hidden size in layer {at}, not {theirs[at]}"
        raise UsageError(f"the quantized model has {what}", "give the elastic folder that it was made from")


def _check_vectors(quantized: Weights, elastic: Weights) -> None:
    """Norms and biases: nobody quantizes them, but smoothing changes them, and with them what experts see."""
    theirs = _vectors(elastic)
    for name, mine in _vectors(quantized).items():
        other = theirs.get(name)
        if other is not None and other.shape == mine.shape:
            worst = float((mine - other).abs().max())
            if worst > SAME * float(other.abs().max()) + 1e-6:
                raise UsageError(f"'{name}' differs from the elastic folder's by {worst:.3g}: its weights were rescaled", NEXT)


def _vectors(weights: Weights) -> dict[str, Tensor]:
    """One-dimensional tensors outside the experts, by their names on disk, or in memory for a GGUF file."""
    if weights.stream is None:
        return {name: t.float() for name, t in weights.model.state_dict().items() if t.ndim == 1}
    source = weights.stream.source
    names = [name for name in source.names() if len(source.info(name).shape) == 1 and ".experts." not in name]
    return {name: source.tensor(name).float() for name in names}

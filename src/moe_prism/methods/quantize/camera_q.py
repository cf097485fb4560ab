"""CAMERA-Q: bits per neuron, by the energy that a neuron puts into its layer's output (CAMERA, arXiv 2508.02322)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibrate.statistics import LayerStatistics
from ...compress.codec.rtn import Rtn
from ...compress.quantize.allocate import cheapest
from ...compress.quantize.bands import BandChange
from ...compress.quantize.decoded import matrices
from ...model import MoELayer
from ...point import NamedPoint, OperatingPoint
from ..base import Subject
from ..statistics import statistics_of
from .averaged import AveragedBits, written_widths

BANDS = 16
"""Shares of a layer's neurons that may differ in width."""


@dataclass(frozen=True, kw_only=True)
class CameraQParameters:
    """bits: mean width of a neuron, 0: each of AVERAGES. widths: bits that a neuron may have, with - between. group: inputs that share a
    scale.
    """

    bits: float = 0
    widths: str = "1-2-3"
    group: int = 32


class CameraQ(AveragedBits):
    """`camera-q:2.5`, or `camera-q:bits=2.5:widths=1-2-3-4`. All of a layer's neurons are ranked together, rounded to nearest."""

    needs = ("how often each expert is chosen", "a sample of its inputs")
    paper = "arXiv 2508.02322"
    Parameters = CameraQParameters
    parameters: CameraQParameters

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        widths = written_widths(asked.widths, asked.group)
        averages = self.averages(asked.bits, widths)
        found, more = energies(subject), "" if asked.widths == CameraQParameters.widths else f"-of-{asked.widths}"
        layers = [layer.parts.layer for layer in subject.elastic.layers]
        losses = [rounding_losses(layer, asked.group, widths) for layer in layers]
        named = []
        for mean in averages:
            each = [banded(own, lost, widths, mean) for own, lost in zip(found, losses, strict=True)]
            neurons = tuple(tuple("".join(map(str, expert)) for expert in own.tolist()) for own in each)
            point = OperatingPoint(weights=BandChange(Rtn(), neurons, asked.group).part())
            named.append(NamedPoint(name=f"camera-q-{mean:g}{more}", point=point))
        return named


def energies(subject: Subject) -> list[Tensor]:
    """[E, f] (float64) of every layer, measured once."""
    key = "neuron energies"
    if key not in subject.cache:
        layers = [layer.parts.layer for layer in subject.elastic.layers]
        gathered = statistics_of(subject, ("counts", "tokens")).layers
        subject.cache[key] = [energy(layer, own) for layer, own in zip(layers, gathered, strict=True)]
    return subject.cache[key]  # type: ignore[no-any-return]


@torch.no_grad()
def energy(layer: MoELayer, statistics: LayerStatistics) -> Tensor:
    """[E, f]: what the layer's output loses in squared norm, over all tokens, if a neuron alone is removed; by the sampled tokens.

    An expert without samples has the mean of the others.
    """
    counts, found = (
        statistics.values["counts"]["count"].double(),
        torch.zeros(layer.num_experts, layer.width, dtype=torch.float64),
    )
    seen = torch.zeros(layer.num_experts, dtype=torch.bool)
    for e in range(layer.num_experts):
        x, weight = statistics.inputs(e)
        if len(weight):
            a = layer.activations(e, x.to(layer.up)).double() * weight.double()[:, None]
            found[e] = a.square().mean(0) * counts[e] * layer.down[e].double().square().sum(0)
            seen[e] = True
    found[~seen] = found[seen].mean() if seen.any() else 1.0
    return found


def rounding_losses(layer: MoELayer, group: int, widths: Sequence[int]) -> list[float]:
    """The squared error of a width, as a share of the weights' squared size."""
    codec, own = Rtn(), matrices(layer)
    size = sum(float(w.double().square().sum()) for w in own)
    found = []
    for bits in widths:
        planes = [codec.encode(w, bits, group) for w in own]
        lost = (codec.decode(stored, bits) - w.float() for stored, w in zip(planes, own, strict=True))
        found.append(sum(float(d.double().square().sum()) for d in lost) / size)
    return found


def banded(energy: Tensor, losses: Sequence[float], widths: Sequence[int], mean: float) -> Tensor:
    """[E, f] int64: the bits of every neuron. Bands of equal size in the order of energy get the best widths for their energy."""
    order = energy.flatten().argsort(descending=True, stable=True)
    parts = torch.tensor_split(order, min(BANDS, len(order)))
    costs = torch.stack([energy.flatten()[part].sum() * torch.tensor(losses, dtype=torch.float64) for part in parts])
    chosen = cheapest(costs / costs.max().clamp(min=1e-300), widths, round(mean * len(parts)))
    found = torch.empty(energy.numel(), dtype=torch.int64)
    for part, bits in zip(parts, chosen, strict=True):
        found[part] = bits
    return found.view_as(energy)

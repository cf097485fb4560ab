"""Narrower experts, fewer bits and fewer experts per token at once, different in every layer, under two limits.

A layer's options are combinations of a share of its neurons (ranked by HEAPr), a width of its weights, and a number of experts. What a
share, a width and a number lose is measured one layer at a time on calibration text, as KL to the full model; the losses of a combination
are added. A genetic search takes the options whose sum is least within a limit on the bytes of all experts and one on those that a token
reads (`compress.genetic`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..compress.chain import ChainChange
from ..compress.changes import Change
from ..compress.codec.rtn import Rtn
from ..compress.genetic import Floats, Genetic
from ..compress.quantize import QuantizeChange
from ..compress.quantize.decoded import SOURCE, matrices
from ..compress.slice.change import SliceChange
from ..compress.slice.choose import SliceRequest, choose_neurons
from ..errors import UsageError
from ..frontier.measure import LOGIT_ROWS, measure
from ..model import MoELayer
from ..point import NamedPoint, OperatingPoint, RoutingStage
from .base import Method, Subject
from .neurons.base import LayerSeen, gate_neurons
from .neurons.heapr import Heapr, HeaprParameters
from .skip.profile import own_rule, profile
from .statistics import statistics_of

KEEPS = 1.0, 0.9, 0.75, 0.5
WIDTHS = float(SOURCE), 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0
GROUP = 32
TOKENS = 4096  # of the calibration text that options are measured on
LIMITS = (0.4, 0.3), (0.3, 0.2), (0.25, 0.12)


Scores = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MixedParameters:
    """memory, read: limits as shares of the bytes of all experts, and of those of a token's experts; 0: the other alone counts, and without
    either three pairs of both. generations: of the search.
    """

    memory: float = 0
    read: float = 0
    generations: int = 100


@dataclass(frozen=True)
class LayerOption:
    """What a layer may be: share of its neurons, bits of its weights, experts per token."""

    keep: float
    bits: float
    experts: int


class LayerMix(Method):
    """`mixed:memory=0.35:read=0.25`: the neurons, the bits and the experts per token of every layer, chosen together."""

    acts = "weights"
    needs = ("activations and gradients of each neuron", "calibration text")
    Parameters = MixedParameters
    parameters: MixedParameters

    @classmethod
    def example(cls) -> str:
        return "memory=0.5:read=0.4:generations=5"

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        if not (0 <= asked.memory <= 1 and 0 <= asked.read <= 1 and asked.generations >= 1):
            raise UsageError(
                f"'{self.name}' is outside what mixed takes", "give shares from 0 to 1, and generations of 1 or more"
            )
        pairs = ((asked.memory or 1.0, asked.read or 1.0),) if asked.memory or asked.read else LIMITS
        options = [LayerOption(*each) for each in itertools.product(KEEPS, WIDTHS, range(1, subject.k + 1))]
        scores = neuron_scores(subject)
        losses, (held, read) = _losses(subject, scores, options), _sizes(subject, scores, options)
        full = options.index(LayerOption(KEEPS[0], WIDTHS[0], subject.k))
        whole = np.array([held[:, full].sum(), read[:, full].sum()])
        found = []
        for memory, amount in pairs:
            chosen = Genetic(generations=asked.generations).search(
                losses, np.stack([held, read]), (whole * [memory, amount]).tolist()
            )
            point = _point(subject, scores, [options[option] for option in chosen])
            found.append(NamedPoint(name=f"mixed-{memory:g}-{amount:g}", point=point))
        return found


def _losses(subject: Subject, scores: Scores, options: Sequence[LayerOption]) -> Floats:
    """[L, O]: of a layer's share, its width and its number of experts, added."""
    keeps = _alone(subject, KEEPS, lambda values: sliced(subject, scores, values))
    widths = _alone(subject, WIDTHS, _quantized)
    counts = profile(subject)
    rows = [
        [
            keeps[layer][KEEPS.index(option.keep)]
            + widths[layer][WIDTHS.index(option.bits)]
            + max(0.0, counts[layer][option.experts - 1])
            for option in options
        ]
        for layer in range(subject.layers)
    ]
    return np.array(rows, np.float64)


def neuron_scores(subject: Subject) -> list[torch.Tensor]:
    """[E, f] of every layer, by HEAPr, times how often experts are chosen."""
    ranking = Heapr("heapr:total=true", HeaprParameters(total=True))
    gathered = statistics_of(subject, ranking.collectors).layers
    every = zip(subject.elastic.layers, gathered, strict=True)
    return [ranking.judge(LayerSeen(layer.parts.layer, own.values))[0] for layer, own in every]


def _sizes(subject: Subject, scores: Scores, options: Sequence[LayerOption]) -> tuple[Floats, Floats]:
    """[L, O]: bytes of all experts of a layer, and of those of a token, as often as calibration text chooses each."""
    kept = {keep: sliced(subject, scores, [keep] * subject.layers).kept for keep in KEEPS}
    held = np.zeros((subject.layers, len(options)))
    read = np.zeros_like(held)
    for number, own in enumerate(statistics_of(subject, Heapr.collectors).layers):
        layer, chosen = subject.elastic.layers[number].parts.layer, own.values["neurons"]["count"].double()
        often = chosen / chosen.sum().clamp(min=1)
        for i, option in enumerate(options):
            left = kept[option.keep][number].mask().double().mean(1) * expert_bytes(subject, layer, option.bits)
            held[number, i] = float(left.sum())
            read[number, i] = option.experts * float((often * left).sum())
    return held, read


def _point(subject: Subject, scores: Scores, chosen: Sequence[LayerOption]) -> OperatingPoint:
    parts: list[Change] = [_quantized([option.bits for option in chosen])]
    if any(option.keep < 1 for option in chosen):
        parts.insert(0, sliced(subject, scores, [option.keep for option in chosen]))
    change = parts[0] if len(parts) == 1 else ChainChange(tuple(parts))
    stage = RoutingStage(layers=tuple(option.experts for option in chosen), keep_mass=own_rule(subject))
    routing = () if all(option.experts == subject.k for option in chosen) else (stage,)
    return OperatingPoint(weights=change.part(), routing=routing)


def sliced(subject: Subject, scores: Scores, keeps: Sequence[float]) -> SliceChange:
    """Every layer with its share of the neurons."""
    gates = [gate_neurons(layer.parts) for layer in subject.elastic.layers]
    request = SliceRequest(max(keeps), "layer", shares=tuple(keeps))
    return SliceChange.of(choose_neurons(scores, request, gates))


def _quantized(widths: Sequence[float]) -> QuantizeChange:
    return QuantizeChange(Rtn(), tuple((bits,) for bits in widths), GROUP)


def _alone(subject: Subject, values: Sequence[float], change: Callable[[Sequence[float]], Change]) -> list[list[float]]:
    """KL [L][V] with one layer at a value and the others at the first, which loses nothing."""
    ids = subject.calibration
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    asked: list[OperatingPoint] = []
    for layer, value in itertools.product(range(subject.layers), values[1:]):
        row = [values[0]] * subject.layers
        row[layer] = value
        asked.append(OperatingPoint(weights=change(row).part()))
    with subject.report("losses of options") as update:
        found = measure(subject.model, ids, asked, batch=max(1, LOGIT_ROWS // ids.shape[1]), progress=update)
    losses = iter(max(0.0, each.quality.kl) for each in found)
    return [[0.0, *itertools.islice(losses, len(values) - 1)] for _ in range(subject.layers)]


def expert_bytes(subject: Subject, layer: MoELayer, bits: float) -> float:
    """Of one expert with all of its neurons at a width."""
    shapes = [tuple(matrix.shape[1:]) for matrix in matrices(layer)]
    if bits == SOURCE:
        return sum(torch.Size(shape).numel() for shape in shapes) * subject.elastic.stored_bytes_per_weight
    return float(sum(Rtn().bytes(shape, bits, GROUP) for shape in shapes))

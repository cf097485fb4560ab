"""The rule `d2moe` as a method: a predictor of each slot's rounding error is fitted on calibration text, then one point per budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...calibrate.statistics import LayerStatistics
from ...elastic.coded import CodedLayer, codec_of, row_bytes
from ...elastic.layer import ElasticLayer
from ...elastic.rules.d2moe import written_rows
from ...elastic.rules.threshold import fit_cutoffs
from ...model import MoELayer
from ...point import NamedPoint, OperatingPoint, SlotBits, SlotRule
from ...point.slots import BitRouter
from ..base import Method, Subject
from ..quantize.averaged import written_widths
from ..statistics import statistics_of
from .bits import even

PLACES = 0.75, 0.5, 0.25
"""Of the way from the least width to the largest."""
ROWS = 512  # sampled inputs of an expert
DAMPING = 0.005  # of the inputs' variance, summed over channels


@dataclass(frozen=True, kw_only=True)
class D2MoeParameters:
    """widths: bits that a chosen expert may have, with - between; group: weights that share a scale."""

    widths: str = "2-3-4"
    group: int = 64


class D2MoeMethod(Method):
    """`d2moe`, or with settings `d2moe:widths=2-3-4-8:group=32`."""

    acts = "slots"
    needs = ("calibration text", "a sample of every expert's inputs")
    paper = "arXiv 2504.15299"
    Parameters = D2MoeParameters
    parameters: D2MoeParameters

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        widths = tuple(map(float, written_widths(asked.widths, asked.group)))
        codec_of(widths).check(widths[-1], asked.group)
        key = f"bit router {widths} {asked.group}"
        if key not in subject.cache:
            subject.cache[key] = fitted(subject, widths, asked.group)
        bits: SlotBits = subject.cache[key]
        hidden = subject.elastic.layers[0].parts.layer.hidden
        row = subject.elastic.stored_bytes_per_weight * hidden
        least, most = (row_bytes(hidden, w, asked.group) / row for w in (widths[0], widths[-1]))
        found = []
        for place in PLACES if subject.points is None else even(PLACES, subject.points):
            rule = SlotRule(rule="d2moe", budget=least + place * (most - least), bits=bits)
            found.append(NamedPoint(name=f"{self.name}-{rule.budget:.3f}", point=OperatingPoint(slots=rule)))
        return found


def fitted(subject: Subject, widths: tuple[float, ...], group: int) -> SlotBits:
    """What the rule needs to know of this model."""
    gathered = statistics_of(subject, ("counts", "tokens")).layers
    none = tuple((0.0,) * len(widths) for _ in gathered)
    plain = SlotBits(widths=widths, errors=none, group=group, choosing=widths[-1])
    rows = [fit_layer(layer, plain, own) for layer, own in zip(subject.elastic.layers, gathered, strict=True)]
    errors, texts, levels = (tuple(column) for column in zip(*rows, strict=True))
    return replace(plain, errors=errors, router=BitRouter(rows=texts, levels=levels))


@torch.no_grad()
def fit_layer(
    layer: ElasticLayer, bits: SlotBits, statistics: LayerStatistics
) -> tuple[tuple[float, ...], str, tuple[float, ...]]:
    """(errors of the widths as shares of that at the least, rows of the router, levels) of one layer.

    Of every expert a ridge of the log errors on its inputs.
    """
    own, coded = layer.parts.layer, CodedLayer(layer.parts, bits)
    inputs = sampled_rows(statistics, own.num_experts)
    errors = [slot_errors(own, [coded.at(w).layer for w in bits.widths], e, x) for e, (x, _) in enumerate(inputs)]
    logs = [lost[:, 0].clamp(min=1e-20).log() for lost in errors]
    mean = float(torch.cat(logs).mean())
    rows = torch.stack([ridge(x, y, mean) for (x, _), y in zip(inputs, logs, strict=True)])
    squared = [weight.double().square() for _, weight in inputs]
    share = torch.stack([(lost * w[:, None]).sum(0) for lost, w in zip(errors, squared, strict=True)]).sum(0)
    levels = predicted_levels(rows, inputs, statistics.values["counts"]["count"])
    return _plain(share / share[0].clamp(min=1e-30)), written_rows(rows), levels


def sampled_rows(statistics: LayerStatistics, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Of every expert some inputs [S, d] and routing weights [S]."""
    every = [statistics.inputs(e) for e in range(experts)]
    return [(x[:ROWS], weight[:ROWS]) for x, weight in every]


def predicted_levels(rows: Tensor, inputs: Sequence[tuple[Tensor, Tensor]], count: Tensor) -> tuple[float, ...]:
    """Quantiles, falling, of what rows [E, d + 1] predict for each expert's inputs and routing weights, as often as count [E] says."""
    found = [x @ row[:-1] + row[-1] + 2 * w.clamp(min=1e-12).log() for row, (x, w) in zip(rows, inputs, strict=True)]
    importance = [torch.full((len(p),), float(count[e]) / max(len(p), 1)) for e, p in enumerate(found)]
    return _plain(fit_cutoffs(torch.cat(found), torch.cat(importance)))


def ridge(x: Tensor, y: Tensor, otherwise: float) -> Tensor:
    """[d + 1] (float32): slope and offset of y [S] on x [S, d]; without any samples no slope, and an offset for those."""
    if not len(x):
        return torch.cat([torch.zeros(x.shape[1]), torch.tensor([otherwise])])
    a, b = (x - x.mean(0)).double(), y - y.mean()
    gram = a.T @ a
    gram += (DAMPING * gram.diagonal().sum() + 1e-9) * torch.eye(len(gram), dtype=gram.dtype)
    slope = torch.linalg.solve(gram, a.T @ b)
    return torch.cat([slope, (y.mean() - x.mean(0).double() @ slope)[None]]).float()


def slot_errors(layer: MoELayer, stored: Sequence[MoELayer], expert: int, x: Tensor) -> Tensor:
    """[S, W] (float64): squared error of an expert's output at every width."""
    x = x.to(layer.up)
    exact = layer.project(expert, layer.activations(expert, x))
    found = [(other.project(expert, other.activations(expert, x)) - exact).double().square().sum(1) for other in stored]
    return torch.stack(found, 1).cpu()


def _plain(row: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in row.tolist())

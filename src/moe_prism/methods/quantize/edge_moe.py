"""EdgeMoE's choice of bits: what the model loses with each expert alone in few bits, under a bound (arXiv 2308.14352, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress.codec.rtn import Rtn
from ...compress.quantize import QuantizeChange
from ...compress.quantize.decoded import matrices
from ...errors import UsageError
from ...frontier.measure import BATCH, logits_of, measure
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from .averaged import one_choice, written_widths
from .pmq import WEIGHED, costs_of

BOUNDS = 0.01, 0.02, 0.05, 0.1
PROBE_TOKENS = 1024  # of the calibration text, for each expert alone
STEPS = 64  # of the mean width, that the bound is met to


@dataclass(frozen=True, kw_only=True)
class EdgeMoeParameters:
    """bound: most KL to the model, nats per token of calibration text, 0: each of BOUNDS; a bound of 0.02 is 2 % of perplexity.

    widths: bits that an expert may have, with - between. group: inputs that share a scale.
    """

    bound: float = 0
    widths: str = "2-3-4-8"
    group: int = 32


class EdgeMoe(Method):
    """`edge-moe:0.02`, or `edge-moe:bound=0.02:widths=2-4-8`. The fewest bits that stay within a bound, rounded to nearest."""

    acts = "weights"
    needs = ("calibration text", "a sample of every expert's inputs")
    paper = "arXiv 2308.14352"
    Parameters = EdgeMoeParameters
    parameters: EdgeMoeParameters

    @classmethod
    def set_by(cls, name: str, parameter: str) -> str:
        return f"{name}:{parameter}={parameter.upper()}"

    @classmethod
    def example(cls) -> str | None:
        return "0.02"

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        widths = written_widths(asked.widths, asked.group)
        losses = expert_losses(subject, widths, asked.group)
        more = "" if asked.widths == EdgeMoeParameters.widths else f"-of-{asked.widths}"
        return [
            NamedPoint(name=f"edge-moe-{bound:g}{more}", point=within(subject, losses, widths, asked.group, bound))
            for bound in ((asked.bound,) if asked.bound else BOUNDS)
        ]


def within(subject: Subject, losses: Sequence[Tensor], widths: Sequence[int], group: int, bound: float) -> OperatingPoint:
    """The point of the least mean width whose own KL on calibration text is within the bound.

    Losses of experts alone decide who gets the bits, not how many: they do not add up. The mean is found by halving, each trial measured.
    """
    experts, ids = sum(map(len, losses)), subject.calibration

    def made(step: int) -> OperatingPoint:
        mean = widths[0] + (widths[-1] - widths[0]) * step / STEPS
        return OperatingPoint(weights=QuantizeChange(Rtn(), one_choice(losses, widths, round(mean * experts)), group).part())

    def lost(step: int) -> float:
        return measure(subject.model, ids, [made(step)])[0].quality.kl

    low, high = -1, STEPS  # the least is not tried yet
    if lost(high) > bound:
        raise UsageError(
            f"{widths[-1]} bits for all lose more than {bound:g} nats per token", "give a larger bound, or more bits"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(middle) <= bound else (middle, high)
    return made(high)


def expert_losses(subject: Subject, widths: Sequence[int], group: int) -> list[Tensor]:
    """[E, W] of every layer: the KL of the model with one expert alone at a width, measured once.

    It is measured at the least width. Other widths lose in proportion to the error of the layer's output (`costs_of`).
    """
    key = f"loss of each expert alone {tuple(widths)} {group}"
    if key not in subject.cache:
        costs = costs_of(subject, Rtn(), group, widths, WEIGHED["error"])
        found = alone(subject, widths[0], group)
        subject.cache[key] = [own[:, None] * cost / cost[:, :1].clamp(min=1e-30) for own, cost in zip(found, costs, strict=True)]
    return subject.cache[key]  # type: ignore[no-any-return]


@torch.no_grad()
def alone(subject: Subject, bits: int, group: int) -> list[Tensor]:
    """[E] (float64) of every layer: KL per token with that expert alone rounded to nearest."""
    elastic, codec = subject.elastic, Rtn()
    layers = [layer.parts.layer for layer in elastic.layers]
    ids = subject.calibration
    ids = ids[: max(1, PROBE_TOKENS // ids.shape[1])]
    stored = [[codec.encode(w, bits, group) for w in matrices(layer)] for layer in layers]
    found = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
    with elastic.at(elastic.full_step, counting=False), subject.report("try experts") as update:
        for number, rows in enumerate(ids.split(BATCH)):
            rows = rows.to(subject.model.device)
            source = logits_of(subject.model, rows).log_softmax(-1)
            for i, layer in enumerate(layers):
                narrow = [codec.decode(planes, bits) for planes in stored[i]]
                for e in range(layer.num_experts):
                    with _written([w[e] for w in matrices(layer)], [w[e] for w in narrow]):
                        elastic.layers[i].forget_scorers()
                        logs = logits_of(subject.model, rows).log_softmax(-1)
                    found[i][e] += float((source.exp() * (source - logs)).sum())
                elastic.layers[i].forget_scorers()
                update(number * len(layers) + i + 1, -(-len(ids) // BATCH) * len(layers))
    tokens = len(ids) * (ids.shape[1] - 1)
    return [own.clamp(min=0) / tokens for own in found]


@contextmanager
def _written(views: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Other weights in the place of these, for the length of a block."""
    saved = [w.clone() for w in views]
    try:
        for w, other in zip(views, others, strict=True):
            w.copy_(other)
        yield
    finally:
        for w, before in zip(views, saved, strict=True):
            w.copy_(before)

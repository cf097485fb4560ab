"""EdgeMoE's choice of bits: what the model loses with each expert alone in few bits, under a bound (arXiv 2308.14352, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...compress.codec import Planes
from ...compress.codec.nested import Nested
from ...compress.codec.rtn import Rtn
from ...compress.quantize import QuantizeChange
from ...compress.quantize.change import Widths
from ...compress.quantize.decoded import matrices
from ...errors import UsageError
from ...frontier.measure import BATCH, logits_of
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from .averaged import one_choice, written_widths
from .pmq import WEIGHED, costs_of

BOUNDS = 0.01, 0.02, 0.05, 0.1
PROBE_TOKENS = 1024  # of the calibration text, for each expert alone
TRIAL_TOKENS = 4096  # of it, for all of them together
STEPS = 64  # of the mean width, that the bound is met to
CODECS = "rtn", "nested"


@dataclass(frozen=True, kw_only=True)
class EdgeMoeParameters:
    """bound: most KL to the model, nats per token of calibration text, 0: each of BOUNDS; a bound of 0.02 is 2 % of perplexity.

    widths: bits that an expert may have, with - between. group: inputs that share a scale. codec: rtn, or nested, as records of planes are.
    """

    bound: float = 0
    widths: str = "2-3-4-8"
    group: int = 32
    codec: str = "rtn"


class EdgeMoe(Method):
    """`edge-moe:0.02`, or `edge-moe:bound=0.02:widths=2-4-8`. The fewest bits that stay within a bound."""

    acts = "weights"
    needs = ("calibration text", "a sample of every expert's inputs")
    paper = "arXiv 2308.14352"
    Parameters = EdgeMoeParameters
    parameters: EdgeMoeParameters

    @classmethod
    def example(cls) -> str | None:
        return "0.02"

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked = self.parameters
        widths = written_widths(asked.widths, asked.group)
        if asked.codec not in CODECS:
            raise UsageError(
                f"'{asked.codec}' is no codec of experts at widths of their own", f"choose one of: {', '.join(CODECS)}"
            )
        key = f"experts at widths {widths} {asked.group} {asked.codec}"
        codec = Nested(most=widths[-1]) if asked.codec == "nested" else Rtn()
        trials: Trials = subject.cache.setdefault(key, Trials(subject, widths, asked.group, codec))
        more = "" if asked.widths == EdgeMoeParameters.widths else f"-of-{asked.widths}"
        more += "" if asked.codec == EdgeMoeParameters.codec else f"-{asked.codec}"
        return [
            NamedPoint(name=f"edge-moe-{bound:g}{more}", point=trials.within(bound))
            for bound in ((asked.bound,) if asked.bound else BOUNDS)
        ]


class Trials:
    """What a model loses with its experts at any widths. Each width is encoded once, so a trial costs two forwards."""

    def __init__(self, subject: Subject, widths: Sequence[int], group: int, codec: Rtn | Nested | None = None) -> None:
        self.subject, self.widths, self.group, self.codec = subject, tuple(widths), group, codec or Rtn()
        self.layers = [layer.parts.layer for layer in subject.elastic.layers]
        self._known: dict[int, float] = {}

    def within(self, bound: float) -> OperatingPoint:
        """The point of the least mean width whose KL on calibration text is within the bound. UsageError where there is none.

        Losses of experts alone decide who gets the bits, not how many: they do not add up. The mean is found by halving, each trial
        measured.
        """
        low, high = -1, STEPS  # the least is not tried yet
        if self.lost(high) > bound:
            raise UsageError(
                f"{self.widths[-1]} bits for all lose more than {bound:g} nats per token", "give a larger bound, or more bits"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.lost(middle) <= bound else (middle, high)
        return OperatingPoint(weights=QuantizeChange(self.codec, self.chosen(high), self.group).part())

    def chosen(self, step: int) -> Widths:
        """The width of every expert at one of STEPS steps from the least mean width to the largest."""
        first, last = self.widths[0], self.widths[-1]
        mean = first + (last - first) * step / STEPS
        return one_choice(self.losses, self.widths, round(mean * sum(map(len, self.losses))))

    @cached_property
    def losses(self) -> list[Tensor]:
        """[E, W] of every layer: the KL of the model with one expert alone at a width.

        It is measured at the least width. Other widths lose in proportion to the error of the layer's output (`costs_of`).
        """
        costs = costs_of(self.subject, self.codec, self.group, self.widths, WEIGHED["error"])
        return [own[:, None] * cost / cost[:, :1].clamp(min=1e-30) for own, cost in zip(self.alone(), costs, strict=True)]

    @cached_property
    def stored(self) -> list[dict[int, list[Planes]]]:
        """Of every layer all experts at every width."""
        return [
            {bits: [self.codec.encode(w, bits, self.group) for w in matrices(layer)] for bits in self.widths}
            for layer in self.layers
        ]

    @torch.no_grad()
    def alone(self) -> list[Tensor]:
        """[E] (float64) of every layer: KL per token with that expert alone at the least width."""
        found = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in self.layers]
        with self.subject.report("try experts") as update:
            for number, (tokens, source, rows) in enumerate(self._batches(PROBE_TOKENS)):
                for i, layer in enumerate(self.layers):
                    narrow = [self.codec.decode(planes, self.widths[0]) for planes in self.stored[i][self.widths[0]]]
                    for e in range(layer.num_experts):
                        with self._written([w[e] for w in matrices(layer)], [w[e] for w in narrow]):
                            found[i][e] += _divergence(source, logits_of(self.subject.model, rows)) / tokens
                    update(number * len(self.layers) + i + 1, -(-tokens // rows[:, 1:].numel()) * len(self.layers))
        return [own.clamp(min=0) for own in found]

    @torch.no_grad()
    def lost(self, step: int) -> float:
        """KL per token at a step, on calibration text; measured once."""
        if step not in self._known:
            rows_of, total = self.chosen(step), 0.0
            for tokens, source, rows in self._batches(TRIAL_TOKENS):
                others = [w for i, own in enumerate(rows_of) for w in self._decoded(i, own)]
                with self._written([w for layer in self.layers for w in matrices(layer)], others):
                    total += _divergence(source, logits_of(self.subject.model, rows)) / tokens
            self._known[step] = total
        return self._known[step]

    def _decoded(self, i: int, widths: Sequence[float]) -> list[Tensor]:
        """gate, where there is one, up and down of a layer whose experts have these widths."""
        found = [torch.empty_like(w, dtype=torch.float32) for w in matrices(self.layers[i])]
        for bits in sorted(set(widths)):
            mine = torch.tensor([own == bits for own in widths], device=found[0].device)
            for matrix, planes in zip(found, self.stored[i][int(bits)], strict=True):
                matrix[mine] = self.codec.decode(planes, bits)[mine].to(matrix.device)
        return found

    def _batches(self, most: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(predictions in all, log-probabilities of the model itself, token ids) of batches of calibration text."""
        ids, elastic = self.subject.calibration, self.subject.elastic
        ids = ids[: max(1, most // ids.shape[1])]
        for rows in torch.split(ids.to(self.subject.model.device), BATCH):
            with elastic.at(elastic.full_step, counting=False):
                yield len(ids) * (ids.shape[1] - 1), logits_of(self.subject.model, rows).log_softmax(-1), rows

    @contextmanager
    def _written(self, views: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
        """Other weights in the place of these, for the length of a block."""
        saved = [w.clone() for w in views]
        try:
            for w, other in zip(views, others, strict=True):
                w.copy_(other)
            self._forget()
            yield
        finally:
            for w, before in zip(views, saved, strict=True):
                w.copy_(before)
            self._forget()

    def _forget(self) -> None:
        for layer in self.subject.elastic.layers:
            layer.forget_scorers()


def _divergence(source: Tensor, logits: Tensor) -> float:
    """The sum over tokens of the KL between log-probabilities [T, V] and those of logits [T, V]."""
    return float((source.exp() * (source - logits.log_softmax(-1))).sum())

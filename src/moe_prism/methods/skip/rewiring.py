"""Rewiring (arXiv 2510.14853): one vector per layer is added to the router's logits, fitted on the text that stands before the answer.

z' = z + delta, and the best k of z' are taken. A few steps of Adam on the next-token loss of the text, everything but the vectors frozen:
the choice of experts has no gradient, their weights do, and so have the layers behind. The last fifth of the text is kept out of the
gradient, and the vectors of the step with the least loss there are taken, those of no step included. Layers are chosen by what the paper
calls confidence, C = -(1/k) sum log p over a token's experts, which is large where the router is unsure: the formula is followed by
default, `sure` takes the other end. Rate, share and bound are not in the paper's abstract; they are the issue's. Shapes: T tokens, E
experts, k of them per token, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...elastic import Elastic
from ...elastic.layer import ElasticLayer
from ...errors import UsageError
from ...model.scores import ACTIVATIONS
from ...point import RoutingStage
from ...routing.base import Routed, Stage, VariantIndex
from ..base import Subject
from ..steps import ended
from .base import Fitted, SkipMethod, all_experts, calibration_facts
from .top_p import router_weights, where_off

RATE, BOUND = 0.05, 1.0  # of Adam; of every entry of a vector, in logits
HELD_OUT = 0.2  # of the text
LEAST = 10  # tokens of a text that anything can be fitted on


class Rewire(Stage):
    """The best k of the rewired scores, with the weights that the router gives such scores."""

    neutral_values: ClassVar[Mapping[str, float]] = {"delta": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    adds: ClassVar[bool] = True
    paper = "arXiv 2510.14853"

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        return not any(self.column("delta").of_variant(variant, layer))

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        delta = self.column("delta").at(routed.layer, which, routed.x.device)
        delta = delta[None] if delta.dim() == 1 else delta
        if delta.shape[1] not in (1, routed.experts):
            raise UsageError(f"the vectors of 'rewiring' are for {delta.shape[1]} experts", "make the point for this model")
        scores = routed.scores()[:, : routed.experts]
        after = rewired(routed, scores, _logits(scores) + delta, self.keep_mass)
        off = (delta == 0).all(1, keepdim=True)
        return after if isinstance(which, int) else where_off(routed, after, off)


def rewired(routed: Routed, scores: Tensor, logits: Tensor, keep_mass: bool) -> Routed:
    """The router's choice [T, k] by other logits [T, E]; scores [T, E]: its own probabilities."""
    new = logits.softmax(1) if _is_softmax(scores) else logits.sigmoid()
    index = new.topk(routed.index.shape[1], 1).indices  # without gradient
    weight = router_weights(routed, scores, new.gather(1, index), keep_mass)
    none = routed.index < 0  # a token that the router gave fewer keeps as few
    return replace(routed, index=index.masked_fill(none, -1), weight=weight.masked_fill(none, 0.0).to(routed.weight.dtype))


def _is_softmax(scores: Tensor) -> bool:
    """Whether probabilities [T, E] are those of a softmax, and not of a sigmoid each."""
    return bool(((scores.detach().sum(1) - 1).abs() < 1e-3).all())


def _logits(scores: Tensor) -> Tensor:
    """Up to a constant per token, what the activation was given."""
    tiny = torch.finfo(torch.float32).tiny
    return scores.clamp(min=tiny).log() if _is_softmax(scores) else torch.logit(scores, eps=1e-7)


@dataclass(frozen=True, kw_only=True)
class Rewiring:
    """steps: of Adam, 0 changes nothing; share: of the layers that are rewired, at least one; sure: the layers whose router is surest."""

    steps: int = 5
    share: float = 0.25
    sure: bool = False
    rate: float = RATE

    def check(self) -> None:
        """UsageError for a number out of range."""
        if not (0 <= self.steps <= 1000 and 0 < self.share <= 1 and 0 < self.rate <= 10):
            raise UsageError(
                "rewiring takes 0 to 1000 steps, a share in (0, 1] and a rate in (0, 10]", "5 steps and .25 are usual"
            )


@dataclass(frozen=True)
class Rewired:
    """stage: to put before others of a point; None where no step made the loss smaller. layers: that have a vector.

    before, after: loss of the part of the text that vectors were fitted on; held_before, held_after: of the part that chose the step.
    """

    stage: RoutingStage | None
    layers: tuple[int, ...]
    before: float
    after: float
    held_before: float
    held_after: float
    steps: int

    def to_json(self) -> dict[str, Any]:
        """Without the vectors, which the operating point has."""
        numbers = {name: getattr(self, name) for name in ("before", "after", "held_before", "held_after")}
        return {"layers": list(self.layers), "steps": self.steps, **{name: round(value, 6) for name, value in numbers.items()}}


class _Wired:
    """One layer while its vector is fitted. Layers without a vector run as they are."""

    def __init__(self, layer: ElasticLayer, keep_mass: bool) -> None:
        self.layer, self.keep_mass = layer, keep_mass
        self.delta: Tensor | None = None
        self.unsure: list[Tensor] = []

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        own = self.layer.parts.layer
        if self.delta is None:
            with torch.no_grad():
                scores = self.layer.routed(x, index, weight, {}).scores()
                self.unsure.append(-scores.gather(1, index.clamp(0, scores.shape[1] - 1)).clamp(min=1e-30).log().mean())
            return own.stock(x, index, weight)
        with torch.no_grad():  # what the activation is
            self.layer.router_scores(x, index, weight)
        plain = self.layer.router_scores.logits(x)[:, : own.num_experts]
        scores = ACTIVATIONS[self.layer.router_scores.activation or "softmax"](plain)
        after = rewired(self.layer.routed(x, index, weight, {}), scores, plain + self.delta, self.keep_mass)
        return own.stock(x, after.index.clamp(min=0), after.weight)


def rewire(model: Any, elastic: Elastic, ids: Tensor, settings: Rewiring) -> Rewired:
    """Fit vectors to texts ids [n, length]; nothing of the model is changed, and nothing of a request before is known.

    UsageError for texts of less than ten tokens, and for a router that does not take the best k of its scores.
    """
    return ended(rewiring(model, elastic, ids, settings))


def rewiring(model: Any, elastic: Elastic, ids: Tensor, settings: Rewiring) -> Generator[None, None, Rewired]:
    """The same in steps of one pass each. Between two of them the model is as it was, so others may run it."""
    settings.check()
    split = ids.shape[1] - max(1, round(HELD_OUT * ids.shape[1]))
    if ids.shape[1] < LEAST:
        raise UsageError(f"a text of {ids.shape[1]} tokens is too short to rewire by", f"give {LEAST} or more, or leave it out")
    layers = [_Wired(layer, elastic.normalises()) for layer in elastic.layers]
    if any(layer.layer.parts.layer.is_dense or layer.layer.parts.layer.extra is not None for layer in layers):
        raise UsageError("rewiring needs routed experts, all of them weights", "leave it out")

    @contextmanager
    def wired() -> Iterator[None]:
        needed = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        try:
            for layer in layers:
                layer.layer.parts.layer.install(layer)
            with torch.enable_grad():
                yield
        finally:
            for own in elastic.layers:
                own.parts.layer.install(own)
            for p in needed:
                p.requires_grad_(True)

    return (yield from _fitted(_Losses(lambda: _losses(model, ids, split), wired), layers, settings))


@dataclass(frozen=True)
class _Losses:
    """losses(): of what is fitted on, and of what is held out, while `wired` is entered."""

    losses: Callable[[], tuple[Tensor, Tensor]]
    wired: Callable[[], AbstractContextManager[None]]

    def seen(self) -> tuple[float, float]:
        """Without gradient."""
        with self.wired(), torch.no_grad():
            loss, held = self.losses()
            return float(loss), float(held)

    def step(self, optimiser: torch.optim.Optimizer) -> tuple[float, float]:
        """Gradients for the optimiser: the losses before."""
        optimiser.zero_grad()
        with self.wired():
            loss, held = self.losses()
            torch.autograd.backward(loss)
        return float(loss.detach()), float(held.detach())


def _losses(model: Any, ids: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """(mean next-token loss of what is fitted on, of what is held out)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return each[:, : split - 1].mean(), each[:, split - 1 :].mean()


def _fitted(run: _Losses, layers: Sequence[_Wired], settings: Rewiring) -> Generator[None, None, Rewired]:
    first, held = run.seen()
    yield
    order = sorted(range(len(layers)), key=lambda i: float(torch.stack(layers[i].unsure).mean()), reverse=not settings.sure)
    chosen = tuple(sorted(order[: max(1, round(settings.share * len(layers)))]))
    best: tuple[float, float, int, list[Tensor]] = (held, first, 0, [])
    for i in chosen:
        own = layers[i].layer.parts.layer
        layers[i].delta = torch.zeros(own.num_experts, device=own.up.device, requires_grad=True)
    vectors = [layers[i].delta for i in chosen]
    deltas = [v for v in vectors if v is not None]
    again, _ = run.seen()
    if abs(again - first) > 1e-2 * max(1.0, abs(first)):
        raise UsageError(
            "the router does not take the best of its scores, so vectors on them do not fit it", "leave rewiring out"
        )
    optimiser = torch.optim.Adam(deltas, lr=settings.rate)
    for step in range(settings.steps + 1):
        yield
        loss, outside = run.seen() if step == settings.steps else run.step(optimiser)
        if step and outside < best[0]:
            best = outside, loss, step, [d.detach().clone() for d in deltas]
        if step == settings.steps:
            break
        optimiser.step()
        with torch.no_grad():
            for d in deltas:
                d.clamp_(-BOUND, BOUND)
    found = dict(zip(chosen, best[3], strict=False))
    stage = None
    if any(bool(d.any()) for d in found.values()):
        k = layers[0].layer.elastic.k or 1
        rows = tuple(tuple(float(f"{v:.6g}") for v in found[i].tolist()) if i in found else (0.0,) for i in range(len(layers)))
        stage = RoutingStage(
            layers=(k,) * len(layers), stage="rewiring", parameters={"delta": rows}, keep_mass=layers[0].keep_mass
        )
    return Rewired(stage, chosen, first, best[1], held, best[0], best[2])


@dataclass(frozen=True, kw_only=True)
class RewiringParameters:
    """steps: of Adam on calibration text; share: of the layers."""

    steps: int = 20
    share: float = 0.25


class RewiringMethod(SkipMethod):
    """`rewiring:STEPS`: vectors on the router's logits, fitted on the calibration text once instead of on every prompt."""

    needs = ("calibration text", "router probabilities", "gradients")
    paper = "arXiv 2510.14853"
    stage: ClassVar[type[Rewire]] = Rewire
    Parameters = RewiringParameters
    parameters: RewiringParameters

    @classmethod
    def example(cls) -> str:
        return "3"

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        if mean is not None and mean != subject.k:
            raise UsageError(f"'{self.name}' keeps all of a token's experts", "leave the mean out")
        asked = Rewiring(steps=self.parameters.steps, share=self.parameters.share)
        done = rewire(subject.model, subject.elastic, subject.calibration[:WINDOWS], asked)
        neutral = RoutingStage(layers=all_experts(subject), stage="rewiring", parameters={"delta": ((0.0,),) * subject.layers})
        return Fitted(done.stage or neutral, subject.k, {**done.to_json(), **calibration_facts(subject)})

    def means(self, subject: Subject) -> Sequence[float | None]:
        return [None]


WINDOWS = 8  # of the calibration text that are in memory with their gradients

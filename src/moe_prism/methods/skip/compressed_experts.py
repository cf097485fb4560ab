"""Compressed Experts (arXiv 2503.00634): what a token skips of its experts becomes three vectors that the others multiply by.

Of a token's k experts the n with the largest routing weights run, the main ones. Each of the others has vectors (v1 [d], v2 [f], v3 [d]).
Their mean by routing weight is the token's own, and its main experts compute down((act(gate(x v1)) up(x v3)) v2). With ones this is plain
top-n. The paper trains the vectors with the model. Here the model is frozen: Adam lowers the error of every layer's output by itself, on
calibration text. The last quarter of the text says what that is worth. Where the error does not fall, the layer keeps ones.

Shapes: T tokens, d hidden, f neurons per expert, k experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...elastic.execute.scaled import scaled_activations
from ...errors import UsageError
from ...model.base import MoELayer, is_expert
from ...model.extra import ExtraExperts, Kind
from ...point import RoutingStage
from ...routing.base import Factors, Routed, SkipStage, VariantIndex, ranks
from ..base import Subject
from .base import Fitted, SkipMethod, calibration_facts, counts_of, skip_method
from .profile import own_rule, views

NAMES = ("gate", "up", "neurons")
"""Of the vectors: v1, v3, v2."""
STEPS, RATE, BATCH = 200, 1e-2, 512
ROWS = 4096  # tokens of the calibration text that vectors are fitted on, at most
HELD = 4  # one of so many parts of them says what that is worth


@dataclass(frozen=True, eq=False)
class ReadVectors(ExtraExperts):
    """Experts that add nothing, and of which a token reads `size` numbers."""

    size: int = 0

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        return (self.size,) * len(self)


class CompressedExpertsStage(SkipStage):
    """A token's n best experts, with the vectors of the others. Without parameters the vectors are ones."""

    paper = "arXiv 2503.00634"
    needs: ClassVar[frozenset[str]] = frozenset({"factors"})

    def __init__(self, variants: Sequence[RoutingStage]) -> None:
        super().__init__(variants)
        for variant in variants:
            if variant.parameters and set(variant.parameters) != {*NAMES, "experts"}:
                raise UsageError("stage 'compressed-experts' lacks its vectors", "make it with `moe-prism skip`")
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}
        first = next((variant.parameters for variant in variants if variant.parameters), None)
        if first is not None:
            experts = int(first["experts"][0][0])
            size = sum(len(first[name][0]) for name in NAMES) // max(1, experts)
            nothing: Kind = "zero"
            self.extra = ReadVectors((nothing,) * experts, size=size)

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        return (ranks(ranked) < self.counts.at(layer, which, ranked.device)).expand(ranked.shape)

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        after = super().route(routed, which)
        if self.extra is None:
            return after
        skipped = is_expert(routed.index, routed.experts) & (after.index < 0)
        gate, up, neurons = self._mixed(routed, skipped, which)
        # an id of its own for every expert whose vectors are read: it adds nothing, and is counted
        index = torch.where(skipped, routed.index + routed.first_extra, after.index)
        return replace(after, index=index, factors=Factors(skipped.any(1), gate, up, neurons))

    def _mixed(self, routed: Routed, skipped: Tensor, which: VariantIndex) -> tuple[Tensor, ...]:
        """[T, d], [T, d], [T, f]: the vectors of each token."""
        share = shares(routed.weight, skipped)
        at = routed.index.clamp(0, routed.experts - 1)
        tables = self._of_layer(routed)
        variant = which.reshape(-1, 1).to(at.device) if isinstance(which, Tensor) else which
        at = at + variant * routed.experts
        return tuple(mixed(table, at, share) for table in tables)

    def _of_layer(self, routed: Routed) -> tuple[Tensor, ...]:
        """[P E, d], [P E, d], [P E, f] of all variants."""
        key = (routed.layer, routed.x.device)
        if key not in self._tables:
            found = [self._table(name, routed) for name in NAMES]
            self._tables[key] = tuple(found)
        return self._tables[key]

    def _table(self, name: str, routed: Routed) -> Tensor:
        rows = [variant.parameters[name][routed.layer] if variant.parameters else () for variant in self.variants]
        length = max(len(row) for row in rows)
        width = routed.x.shape[1] if name != "neurons" else length // routed.experts
        if any(len(row) not in (0, routed.experts * width) for row in rows):
            raise UsageError("the vectors of stage 'compressed-experts' are of another model", "make the point for this model")
        numbers = [list(row) or [1.0] * length for row in rows]
        return torch.tensor(numbers, device=routed.x.device).view(-1, width)


def shares(weight: Tensor, skipped: Tensor) -> Tensor:
    """[T, k] float32: of the routing weights of what a token skips, summing to one; zeros where it skips nothing."""
    size = weight.float().abs().masked_fill(~skipped, 0.0)
    return size / size.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def mixed(table: Tensor, at: Tensor, share: Tensor) -> Tensor:
    """[T, w]: the mean of rows `at` [T, k] of a table [R, w] by share [T, k]; one choice at a time, so no token sees its batch."""
    out = share[:, :1] * table[at[:, 0]]
    for c in range(1, at.shape[1]):
        out = out + share[:, c, None] * table[at[:, c]]
    return out


@dataclass(frozen=True, kw_only=True)
class CompressedExpertsParameters:
    """counts: the method that says how many experts run in every layer; steps: of fitting a layer; rate: of Adam."""

    counts: str = "sensitivity"
    steps: int = STEPS
    rate: float = RATE


class CompressedExperts(SkipMethod):
    """`compressed-experts:COUNTS`: the counts of another method, and vectors in the place of what they skip."""

    needs = ("calibration text",)
    paper = "arXiv 2503.00634"
    stage: ClassVar[type[CompressedExpertsStage]] = CompressedExpertsStage
    multiplies_inside = True
    served_by = "generate, serve"
    Parameters = CompressedExpertsParameters
    parameters: CompressedExpertsParameters

    @classmethod
    def example(cls) -> str:
        return "steps=5"

    def means(self, subject: Subject) -> Sequence[float | None]:
        return skip_method(self.parameters.counts).means(subject)

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        if self.parameters.steps < 1 or not self.parameters.rate > 0:
            raise UsageError(
                f"'{self.name}' fits nothing", f"give steps of 1 or more and a rate, or neither for {STEPS} and {RATE}"
            )
        plain = counts_of(self.parameters.counts, subject, mean)
        inputs = views(subject, "input", lambda routed: routed.x)
        index = views(subject, "experts", lambda routed: routed.index)
        weight = views(subject, "weights", lambda routed: routed.weight.float().abs())
        vectors, errors = [], []
        with subject.report("fit vectors") as update:
            for i, n in enumerate(plain.stage.layers):
                found, error = fitted(
                    subject.elastic.layers[i].parts.layer, (inputs[i], index[i], weight[i]), n, own_rule(subject), self.parameters
                )
                vectors.append(found)
                errors.append(error)
                update(i + 1, subject.layers)
        parameters = {
            name: tuple(tuple(float(f"{v:.4g}") for v in layer[j].flatten().tolist()) for layer in vectors)
            for j, name in enumerate(NAMES)
        }
        experts = tuple((float(layer[0].shape[0]),) for layer in vectors)
        stage = RoutingStage(layers=plain.stage.layers, stage="compressed-experts", parameters={**parameters, "experts": experts})
        facts = {"layer_errors": [[round(v, 5) for v in pair] for pair in errors], "steps": self.parameters.steps}
        return Fitted(stage, plain.mean, {**facts, **calibration_facts(subject)})


Rows = tuple[Tensor, Tensor, Tensor]
"""x [S, d], experts [S, k], routing weights [S, k]."""


def fitted(
    layer: MoELayer, rows: Rows, n: int, scales: bool, parameters: CompressedExpertsParameters
) -> tuple[tuple[Tensor, ...], tuple[float, float]]:
    """(v1 [E, d], v3 [E, d], v2 [E, f]) of a layer whose n best experts run, and the output's squared error, relative, before and after.

    scales: whether the weights of those that run are scaled to the sum of all. Both errors are on rows that nothing was fitted on.
    """
    every = max(1, len(rows[0]) // ROWS)
    x, index, weight = (value[::every].to(layer.up.device) for value in rows)
    x = x.float()
    sizes = (layer.num_experts, layer.hidden), (layer.num_experts, layer.hidden), (layer.num_experts, layer.width)
    ones = tuple(torch.ones(size, device=x.device) for size in sizes)
    if n >= index.shape[1]:
        return ones, (0.0, 0.0)
    problem = _Problem(layer, x, index, weight, n, scales)
    held = torch.arange(len(x) - len(x) // HELD, len(x), device=x.device)
    found = problem.solve(len(x) - len(held), parameters)
    with torch.no_grad():
        before, after = (float(problem.error(held, vectors)) for vectors in (ones, found))
    return (found, (before, after)) if after < before else (ones, (before, before))


class _Problem:
    """The output of a layer from its main experts, as a function of the vectors."""

    def __init__(self, layer: MoELayer, x: Tensor, index: Tensor, weight: Tensor, n: int, scales: bool) -> None:
        self.layer, self.x = layer, x
        chosen = is_expert(index, layer.num_experts)
        size = weight.masked_fill(~chosen, -1.0)
        order = size.sort(dim=1, descending=True, stable=True).indices
        main = torch.zeros_like(chosen).scatter_(1, order, (ranks(size) < n).expand(size.shape)) & chosen
        skipped = chosen & ~main
        self.share, self.at = shares(weight, skipped), index.clamp(0, layer.num_experts - 1)
        size = size.clamp(min=0)
        scale = size.sum(1, keepdim=True) / (size * main).sum(1, keepdim=True).clamp(min=1e-9) if scales else 1.0
        self.weight = (size * main * scale).float()
        self.main = index.masked_fill(~main, -1)
        with torch.no_grad():
            self.target = layer.by_expert(x, index.masked_fill(~chosen, -1), weight).float()

    def error(self, rows: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Squared, relative to the output's own square."""
        share, at = self.share[rows], self.at[rows]
        gate, up, neurons = (mixed(table, at, share) for table in vectors)
        there = share.sum(1) > 0  # a token that skips nothing multiplies nothing
        gate, up, neurons = (torch.where(there[:, None], value, 1.0) for value in (gate, up, neurons))
        factors = Factors(there, gate, up, neurons)
        x, main, weight = self.x[rows], self.main[rows], self.weight[rows]
        out = torch.zeros_like(x)
        for e in torch.unique(main[main >= 0]).tolist():
            token, choice = torch.where(main == e)
            y = self.layer.project(e, scaled_activations(self.layer, e, x[token], factors.of(token)))
            y = y if self.layer.down_bias is None else y + self.layer.down_bias[e]
            out = out.index_add(0, token, y.float() * weight[token, choice, None])
        target = self.target[rows]
        return (out - target).square().sum() / target.square().sum().clamp(min=1e-30)

    def solve(self, count: int, parameters: CompressedExpertsParameters) -> tuple[Tensor, ...]:
        """The vectors after Adam on the first `count` rows; the rate falls to nothing."""
        generator = torch.Generator().manual_seed(0)
        e, d, f = self.layer.num_experts, self.layer.hidden, self.layer.width
        vectors = [nn.Parameter(torch.ones(e, width, device=self.x.device)) for width in (d, d, f)]
        optimizer = torch.optim.Adam(vectors, lr=parameters.rate)
        with torch.enable_grad():
            for step in range(parameters.steps):
                rows = torch.randint(count, (min(BATCH, count),), generator=generator).to(self.x.device)
                optimizer.param_groups[0]["lr"] = parameters.rate * (1 - step / parameters.steps)
                loss = self.error(rows, vectors)
                optimizer.zero_grad()
                torch.autograd.backward(loss, inputs=vectors)
                optimizer.step()
        return tuple(vector.detach() for vector in vectors)

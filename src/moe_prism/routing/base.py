"""The contract of a routing stage. Shapes: T tokens, k experts per token, E experts, d hidden, L MoE layers, P variants.

A stage sees what the router chose and says what is made of it: fewer experts, more, others, with other weights. What the router does
before is untouched. A stage that wants more than the choice asks `Routed` for it and says so in `needs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..model.extra import ExtraExperts
from ..point import RoutingStage

if TYPE_CHECKING:
    from ..attention.watch import Attended

VariantIndex = int | Tensor
"""Which variant of a stage: one for all tokens, or one per token [T] (int64)."""


def outside(which: VariantIndex, count: int) -> int | None:
    """A number that is not in 0..count - 1, None where there is none. Indices on a GPU are not asked for."""
    if isinstance(which, Tensor):
        if which.device.type != "cpu" or not which.numel():
            return None
        low, high = int(which.min()), int(which.max())
    else:
        low = high = which
    return low if low < 0 else high if high >= count else None


def _unavailable() -> Any:
    raise UsageError("nobody offers what this routing stage asks for", "run it on a model that moe-prism has loaded")


@dataclass(slots=True, eq=False)
class Factors:
    """What tokens multiply inside their experts: gate, up [T, d] the input of either matrix, neurons [T, f] the activations.

    rows [T] bool: the tokens that multiply anything. The numbers of the others are not read.
    """

    rows: Tensor
    gate: Tensor
    up: Tensor
    neurons: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return self.rows, self.gate, self.up, self.neurons

    def of(self, rows: Tensor) -> Factors:
        """Of some of the tokens."""
        return Factors(*(value[rows] for value in self.tensors))


# Made for every layer of every step: freezing would cost as much as routing does.
@dataclass(slots=True, eq=False)
class Routed:
    """A batch on its way through the stages of one layer.

    x [T, d]: the layer's input. index [T, k]: expert ids, -1 for no expert; ids from E on are experts that are not weights
    (`model.extra`): the model's own, then from first_extra on those of the stage. weight [T, k]. k may change from stage to stage.
    scores() gives the router's probabilities [T, E], residual() the residual stream [T, d]: both are computed when asked for. state:
    what stages carry from layer to layer of one forward, [T, ...] each. past: which tokens came before (`elastic.control.Past` of these
    rows); None: nobody knows. cutoff [T]: of a token's experts only neurons whose gate is at least that large are computed; None: all.
    factors: of its experts' inputs and activations; None: of no token. attention(): what the attention before the layer was asked.
    """

    x: Tensor
    index: Tensor
    weight: Tensor
    layer: int
    experts: int
    first_extra: int
    scores: Callable[[], Tensor] = _unavailable
    residual: Callable[[], Tensor] = _unavailable
    state: dict[str, Tensor] = field(default_factory=dict)
    cutoff: Tensor | None = None
    factors: Factors | None = None
    past: Any = None
    attention: Callable[[], Attended] = _unavailable

    def of(self, rows: Tensor) -> Routed:
        """The part of the batch that rows [S] name. What it carries on is its own: `merged` puts it back."""
        state = {name: value[rows] for name, value in self.state.items()}
        return replace(
            self,
            x=self.x[rows],
            index=self.index[rows],
            weight=self.weight[rows],
            state=state,
            cutoff=None if self.cutoff is None else self.cutoff[rows],
            factors=None if self.factors is None else self.factors.of(rows),
            past=None if self.past is None else self.past.part(rows.cpu().numpy()),
            scores=lambda: self.scores()[rows],
            residual=lambda: self.residual()[rows],
            attention=lambda: self.attention().of(rows),
        )


class Column:
    """A number, or one per routing rank, for every variant and layer; on a device it is stored once."""

    def __init__(self, rows: Sequence[Sequence[Sequence[float]]]) -> None:
        """rows [P][L][1 or k]: one number stands for every rank."""
        width = max(len(numbers) for variant in rows for numbers in variant)
        alike = [[list(numbers) * (width if len(numbers) == 1 else 1) for numbers in variant] for variant in rows]
        self._rows = torch.tensor(alike, dtype=torch.float32)
        self._on = {self._rows.device: self._rows}

    def at(self, layer: int, which: VariantIndex, device: torch.device) -> Tensor:
        """[1 or k] of one variant, or [T, 1 or k] of one per token."""
        if device not in self._on:
            self._on[device] = self._rows.to(device)
        own = self._on[device][:, layer]
        return own[which] if isinstance(which, int) else own[which.reshape(-1).to(device)]

    def of_variant(self, variant: int, layer: int) -> list[float]:
        """The same as Python numbers, without waiting for any device."""
        return self._rows[variant, layer].tolist()


class Stage(ABC):
    """Made from one or more `RoutingStage`s of the same name: variants that differ in numbers, so that one call serves a mixed batch."""

    neutral_values: ClassVar[Mapping[str, float]] = {}
    """The parameters it reads, and the value of each up to which nothing is changed by it."""
    neutral_from: ClassVar[frozenset[str]] = frozenset()
    """Those of them that change nothing from their neutral value on, instead of up to it."""
    paper: ClassVar[str] = ""
    """Where it comes from; empty: our own."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it asks of `Routed` beside the choice: "scores", "residual", "state", "past", "attention"; of executors: "neurons",
    "factors".
    """
    extra: ExtraExperts | None = None
    """Experts that are not weights, which the stage may choose: their ids begin at `Routed.first_extra`."""
    adds: ClassVar[bool] = False
    """Whether it may choose experts that the router did not, and so more of them than k."""
    depends_on_batch: ClassVar[bool] = False
    """Whether a token's experts depend on the other tokens of the batch."""

    def __init__(self, variants: Sequence[RoutingStage]) -> None:
        """Raises UsageError where variants differ in layers or in keep_mass, or lack a parameter."""
        if not variants:
            raise UsageError("a routing stage was given no variant", "give at least one")
        if len({len(v.layers) for v in variants}) > 1 or len({v.keep_mass for v in variants}) > 1:
            raise UsageError("variants of one stage differ in layers or in keep_mass", "make them for the same model and setting")
        self.variants = tuple(variants)
        self.keep_mass = bool(variants[0].keep_mass)
        self.counts = Column([[[float(n)] for n in v.layers] for v in variants])
        for name in self.neutral_values:
            if any(name not in v.parameters for v in variants):
                raise UsageError(f"a routing stage has no parameter '{name}'", "make it with `moe-prism skip`")
        self._columns = {name: Column([v.parameters[name] for v in variants]) for name in self.neutral_values}
        self._neutral: dict[tuple[int, int, int], bool] = {}

    def column(self, name: str) -> Column:
        return self._columns[name]

    def check_which(self, which: VariantIndex) -> None:
        """UsageError for a variant that does not exist. Indices on a GPU are not asked for."""
        wrong = outside(which, len(self.variants))
        if wrong is not None:
            raise UsageError(f"there is no variant {wrong}", f"give one from 0 to {len(self.variants) - 1}")

    def is_neutral(self, layer: int, which: VariantIndex, k: int) -> bool:
        """Whether nothing can change. Never waits for a GPU: indices there count as all variants."""
        if isinstance(which, int):
            rows: Sequence[int] = (which,)
        elif which.device.type == "cpu":
            rows = torch.unique(which).tolist()
        else:
            rows = range(len(self.variants))
        return all(self._row_is_neutral(row, layer, k) for row in rows)

    def _row_is_neutral(self, row: int, layer: int, k: int) -> bool:
        key = (row, layer, k)
        if key not in self._neutral:
            self._neutral[key] = self.keeps_all(row, layer, k)
        return self._neutral[key]

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        """Whether a variant changes nothing in a layer: it keeps k, and every parameter is neutral."""
        neutral = all(self._does_nothing(name, self.column(name).of_variant(variant, layer)) for name in self.neutral_values)
        return neutral and self.counts.of_variant(variant, layer)[0] >= k

    def _does_nothing(self, name: str, values: Sequence[float]) -> bool:
        value = self.neutral_values[name]
        return min(values) >= value if name in self.neutral_from else max(values) <= value

    @classmethod
    def neutral(cls, name: str, layers: int, k: int) -> RoutingStage:
        """The stage of this name that changes nothing."""
        values = {key: ((value,),) * layers for key, value in cls.neutral_values.items()}
        return RoutingStage(layers=(k,) * layers, stage=name, parameters=values, keep_mass=False)

    @abstractmethod
    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        """What is left to be computed. Nothing is read back from a GPU. Not called where the stage `is_neutral`."""

    def __call__(self, routed: Routed, which: VariantIndex = 0) -> Routed:
        """`route`, or the very same batch where nothing can change."""
        if isinstance(which, Tensor) and which.numel() != len(routed.x):
            raise UsageError(f"{which.numel()} variants for {len(routed.x)} tokens", "give one per token of the flattened batch")
        return routed if self.is_neutral(routed.layer, which, routed.index.shape[1]) else self.route(routed, which)


class SkipStage(Stage):
    """A stage that computes some of the router's experts and leaves the others out."""

    @abstractmethod
    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        """keep [T, k] bool, from what a token's experts are ranked by [T, k], largest first; -1 where the router chose no expert.

        The first is always kept; a token whose variant `keeps_all` keeps everything.
        """

    @staticmethod
    def rank_by(routed: Routed) -> Tensor:
        """What experts are ranked by [T, k] (float32, none negative). Here: the size of their routing weights."""
        return routed.weight.float().abs()

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        """Skipped experts get id -1 and weight 0. Equal ranks are in the router's order."""
        index, weight = routed.index, routed.weight
        chosen = index >= 0
        ranked, order = self.rank_by(routed).masked_fill(~chosen, -1.0).sort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(chosen).scatter_(1, order, self.kept(ranked, routed.layer, which)) & chosen
        left = self._weights(weight, weight.float().abs().masked_fill(~chosen, 0.0), keep)
        return replace(routed, index=index.masked_fill(~keep, -1), weight=left)

    def _weights(self, weight: Tensor, size: Tensor, keep: Tensor) -> Tensor:
        if self.keep_mass:
            full, left = size.sum(1, keepdim=True), size.masked_fill(~keep, 0.0).sum(1, keepdim=True)
            scale = (full / left).masked_fill(left <= 0, 1.0)  # exactly 1 for a token that keeps everything
            weight = (weight.float() * scale).to(weight.dtype)
        return weight.masked_fill(~keep, 0.0)


def ranks(ranked: Tensor) -> Tensor:
    """0, 1, ... k - 1 as [k], to compare with counts."""
    return torch.arange(ranked.shape[1], device=ranked.device)


def fit_dial(mean_at: Callable[[float], float], mean: float, *, steps: int = 40) -> float:
    """The dial in [0, 1] at which `mean_at` (falling) reaches `mean`, by bisection; the largest dial that keeps at least that many."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) >= mean else (low, middle)
    return low


def mean_kept(stage: SkipStage, samples: Sequence[Tensor]) -> float:
    """Experts per token and layer that a stage of one variant keeps of what it ranks by, [S, k] per layer, largest first."""
    share = [stage.kept(ranked, layer, 0).sum(1).double().mean() for layer, ranked in enumerate(samples)]
    return float(torch.stack(share).mean())


def merge_state(state: dict[str, Tensor], rows: Tensor, own: Mapping[str, Tensor], tokens: int) -> None:
    """Put what a part of a batch carries (rows [S]) back into the state of all its `tokens`; rows that carry nothing hold zeros."""
    for name, value in own.items():
        if name not in state or state[name].shape[1:] != value.shape[1:]:
            state[name] = value.new_zeros(tokens, *value.shape[1:])
        state[name][rows] = value

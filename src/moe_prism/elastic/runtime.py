"""Install elastic execution on a model, and choose the operating point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..model import MoELayer, find_layers
from ..partition.base import check_blocks
from ..routing import PlanIndex, RoutingPolicy, SkipPlan
from .base import LayerParts, Rule, Scorer, Slots
from .compensate import Compensator, compensator
from .execute import triton_run
from .execute.plain import auto, grouped, reference
from .fused_select import select_few
from .repair import REPAIR, Repaired
from .rules import rules
from .scorers import scorers
from .scorers.ridge import FEW

TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token", "moe_k", "top_k")
"""How configurations name the experts per token."""

EXECUTORS: Mapping[str, Callable[..., Tensor]] = {
    "auto": auto,
    "grouped": grouped,
    "reference": reference,
    "triton": triton_run.deterministic,
    "triton-atomic": triton_run.atomic,
}


@dataclass
class Setting:
    """One operating point. budget: one number, or one per token [T] of the next forward; layers: one number per layer instead.

    compensate: make up for what is dropped, where the artefact was written with `--compensate`. routing: skips whole experts of the
    router's choice before slots are selected, a budget is then a share of the slots that are left; level: which of its plans, one for
    all or one per token [T].
    """

    budget: float | Tensor = 1.0
    rule: str = "product"
    scorer: str = "ridge"
    executor: str = "auto"
    layers: tuple[float, ...] | None = None
    compensate: bool = True
    routing: RoutingPolicy | None = None
    level: PlanIndex = 0

    def at(self, layer: int) -> float | Tensor:
        """The budget of one layer."""
        return self.budget if self.layers is None else self.layers[layer]

    def is_full(self, layer: int) -> bool:
        """Budgets on a GPU are never asked for: that would stop it, and a graph may be replayed with others in their place."""
        budget = self.at(layer)
        if isinstance(budget, Tensor) and budget.device.type != "cpu":
            return False
        return bool((budget >= 1).all()) if isinstance(budget, Tensor) else budget >= 1


@dataclass
class Counter:
    """Slots seen since the last reset, for measured costs: tokens, chosen experts, experts with a kept slot, kept slots.

    Sums stay where they were made: a GPU is waited for when one is read. The replay of a CUDA graph is not counted.
    """

    tokens: int = 0
    _chosen: int | Tensor = 0
    _touched: int | Tensor = 0
    _kept: int | Tensor = 0

    @property
    def chosen(self) -> int:
        return int(self._chosen)

    @property
    def touched(self) -> int:
        return int(self._touched)

    @property
    def kept(self) -> int:
        return int(self._kept)

    def add(self, index: Tensor, keep: Tensor | None, n_sub: int, chosen: Tensor | None = None) -> None:
        """index [T, k], keep [T, k, N] or None for everything; chosen: how many experts, None for all k of every token."""
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self.tokens += index.shape[0]
        self._chosen = self._chosen + (index.numel() if chosen is None else chosen)
        self._touched = self._touched + (index.numel() if keep is None else keep.any(2).sum())
        self._kept = self._kept + (index.numel() * n_sub if keep is None else keep.sum())


@dataclass
class ElasticLayer:
    """One layer's plan, its scorers and rules made on first use, and its counter."""

    plan: LayerParts
    elastic: Elastic
    counter: Counter = field(default_factory=Counter)
    _scorers: dict[str, Scorer] = field(default_factory=dict)
    _rules: dict[str, Rule] = field(default_factory=dict)

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        setting = self.elastic.setting
        full = setting.is_full(self.plan.layer.index) and not self.elastic.always_split
        routed = self._route(index, weight, setting)
        if full and routed is None:
            self._count(index, None)
            return self.plan.layer.native(x, index, weight)
        index, weight = routed or (index, weight)
        valid = self._valid(index)
        if full:  # whole experts: nothing to select, to compensate or to repair
            keep = valid[:, :, None].expand(-1, -1, self.plan.n_sub).contiguous()
            self._count(index, keep, valid)
            return EXECUTORS[setting.executor](self.plan, x, index, weight, keep)
        keep = self.select(x, index, weight, valid, setting)
        self._count(index, keep, None if routed is None else valid)
        extra = self.compensation(setting)
        if extra is None:
            return self._execute(setting, x, index, weight, keep)
        out = self._execute(setting, x, index, extra.weights(index, weight, keep), keep)
        return out + extra(x, index, weight, keep).to(out.dtype)

    def _execute(self, setting: Setting, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        execute = EXECUTORS[setting.executor]
        if REPAIR not in self.plan.tensors:
            return execute(self.plan, x, index, weight, keep)
        return self._repaired(execute, x, index, weight, keep)

    def select(self, x: Tensor, index: Tensor, weight: Tensor, valid: Tensor, setting: Setting) -> Tensor:
        """keep [T, k, N] of a batch under a setting."""
        scorer = self.scorer(setting.scorer) if self.rule(setting.rule).needs_norms else None
        if scorer is not None and index.numel() <= FEW:
            keep = select_few(scorer, self.rule(setting.rule), x, index, weight, setting.at(self.plan.layer.index))
            if keep is not None:
                return keep

        def norms() -> Tensor:
            assert scorer is not None
            return scorer(x, index.clamp(0, self.plan.layer.num_experts - 1))

        slots = Slots(x, index, weight, valid, self.plan.n_sub, norms)
        return self.rule(setting.rule).keep(slots, _per_token(setting.at(self.plan.layer.index), x))

    def _valid(self, index: Tensor) -> Tensor:
        return index.clamp(0, self.plan.layer.num_experts - 1) == index

    def _route(self, index: Tensor, weight: Tensor, setting: Setting) -> tuple[Tensor, Tensor] | None:
        """(index, weight) with the skipped experts gone; None where the policy lets the router's choice pass."""
        policy, layer = setting.routing, self.plan.layer.index
        if policy is None or policy.is_neutral(layer, setting.level, index.shape[1]):
            return None
        marked = index.masked_fill(~self._valid(index), -1)
        routed = policy(marked, weight, layer, setting.level)
        return None if routed[0] is marked else routed

    def _count(self, index: Tensor, keep: Tensor | None, valid: Tensor | None = None) -> None:
        if self.elastic.counting:
            self.counter.add(index, keep, self.plan.n_sub, None if valid is None else valid.sum())

    def compensation(self, setting: Setting) -> Compensator | None:
        """What makes up for dropped slots under a setting, if anything does."""
        return self._compensator if setting.compensate else None

    @cached_property
    def _compensator(self) -> Compensator | None:
        return compensator(self.plan)

    @cached_property
    def _repaired(self) -> Repaired:
        return Repaired(self.plan)

    def forget(self) -> None:
        """Make everything that reads the plan's tensors again at the next call: they have changed."""
        self._scorers.clear()
        self._rules.clear()
        for name in ("_compensator", "_repaired"):
            self.__dict__.pop(name, None)

    def scorer(self, name: str) -> Scorer:
        if name not in self._scorers:
            self._scorers[name] = scorers.get(name)(self.plan)
        return self._scorers[name]

    def rule(self, name: str) -> Rule:
        if name not in self._rules:
            self._rules[name] = rules.get(name)(self.plan)
        return self._rules[name]


class Elastic:
    """The elastic state of a model: `layers`, the current `setting`; `always_split` sends even full budget down the split path.

    `counting`: whether the layers' counters run. They are for measuring costs; generation does not pay for them.
    """

    def __init__(self, model: Any, plans: Sequence[LayerParts]) -> None:
        self.model = model
        self.setting = Setting()
        self.always_split = False
        self.counting = False
        # what a weight costs on the machine that serves; compute may use a wider type (float32 on a CPU)
        self.stored_bytes_per_weight = plans[0].layer.up.element_size()
        self.layers = [ElasticLayer(plan, self) for plan in plans]
        for layer in self.layers:
            layer.plan.layer.install(layer)

    def detach(self) -> None:
        """Give the model its own experts function back."""
        for layer in self.layers:
            layer.plan.layer.uninstall()
        self.model.__dict__.pop("_moe_prism", None)

    def reset_counters(self) -> None:
        """Count from zero, from now on."""
        self.counting = True
        for layer in self.layers:
            layer.counter = Counter()


def attach(
    model: Any,
    n_sub: int,
    *,
    gates: int = 0,
    tensors: Sequence[dict[str, Tensor]] | None = None,
    layers: Sequence[MoELayer] | None = None,
) -> Elastic:
    """Make a model elastic. The neurons of each expert must already be in block order (a refactored checkpoint is).

    n_sub: sub-experts per expert; gates: gate neurons per sub-expert; tensors: side tensors per layer.
    Raises UsageError if a layer's width is not divisible by n_sub.
    """
    found = find_layers(model) if layers is None else layers
    for layer in found:
        if n_sub != 1:  # whole experts
            check_blocks(layer.width, n_sub, f"'{layer.name}'")
    plans = [LayerParts(layer, n_sub, gates, dict(tensors[i]) if tensors else {}) for i, layer in enumerate(found)]
    model._moe_prism = Elastic(model, plans)
    return model._moe_prism  # type: ignore[no-any-return]


@contextmanager
def operating_point(
    model: Any,
    budget: float | Tensor = 1.0,
    *,
    k: int | None = None,
    rule: str | None = None,
    scorer: str | None = None,
    executor: str = "auto",
    compensate: bool = True,
    routing: RoutingPolicy | SkipPlan | Sequence[SkipPlan] | None = None,
    level: PlanIndex = 0,
) -> Iterator[Elastic]:
    """Run everything inside the block at one operating point.

    budget: kept slots / all slots in (0, 1], one number or a tensor [T] with one per token of the flattened batch. k: kept slots
    per token instead, 1..k*N. rule: None takes `threshold` for a budget, which is met on average and spent on the tokens and layers
    that need it, and `product` for k, which is met by every token. scorer: None takes the rule's own (the paper's gate scores for
    `pattern`, else `ridge`). compensate: False leaves dropped slots uncompensated, for comparison. routing: a skip plan, several, or a
    policy: which of the router's experts are left to choose slots from; level: which plan, one number or a tensor [T] with one per token.
    Raises UsageError for a model that is not elastic, an unknown name, a number out of range, or a plan for another model.
    """
    from .bind_plans import policy_for

    elastic: Elastic | None = getattr(model, "_moe_prism", None)
    if elastic is None:
        raise UsageError(
            f"{type(model).__name__} is not elastic", "load it with moe_prism.load(folder written by `moe-prism refactor`)"
        )
    if executor not in EXECUTORS:
        raise UsageError(f"unknown executor '{executor}'", f"choose one of: {', '.join(EXECUTORS)}")
    rule = rule or ("threshold" if k is None else "product")
    rules.get(rule)
    scorer = scorer or ("gates" if rule == "pattern" else "ridge")
    scorers.get(scorer)
    if k is not None:
        slots = slots_per_token(elastic)
        if not isinstance(budget, Tensor) and budget != 1.0:
            raise UsageError(f"both budget {budget:g} and k {k} were given", "give one of them")
        if not 1 <= k <= slots or k != int(k):
            raise UsageError(f"k {k} is outside 1..{slots}", f"give a whole number: a token has {slots} slots")
        budget = k / slots
    if not isinstance(budget, Tensor | Real):
        raise UsageError(
            f"a budget is a number or a tensor, not {type(budget).__name__}", "torch.tensor([...]) has one per token"
        )
    low, high = (budget.min(), budget.max()) if isinstance(budget, Tensor) else (budget, budget)
    if not (low > 0 and high <= 1):
        raise UsageError(f"budget {float(low):g} is outside (0, 1]", "1 keeps every slot, 0.5 half of them")
    policy = None if routing is None else policy_for(elastic, routing)
    if policy is not None:
        policy.check_level(level)
    before = elastic.setting
    elastic.setting = Setting(budget, rule, scorer, executor, None, compensate, policy, level)
    try:
        yield elastic
    finally:
        elastic.setting = before


def slots_per_token(elastic: Elastic) -> int:
    """k*N, read from the model's configuration; 1*N for a dense model."""
    plan = elastic.layers[0].plan
    return experts_per_token(elastic.model, plan.layer) * plan.n_sub


def experts_per_token(model: Any, layer: MoELayer) -> int:
    """k of the router, as the configuration, the block or the layer names it."""
    if layer.num_experts == 1:
        return 1
    config = getattr(layer.module, "config", model.config)
    owners = config, model.get_submodule(layer.block_name), layer
    for value in (getattr(owner, name, None) for owner in owners for name in TOP_K_NAMES):
        if isinstance(value, int) and value > 0:
            return value
    raise UsageError(f"cannot tell how many experts '{layer.name}' uses per token", "give a budget instead of k")


def _per_token(budget: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(budget, Tensor):
        return torch.full((x.shape[0],), float(budget), device=x.device)
    if budget.numel() != x.shape[0]:
        raise UsageError(f"{budget.numel()} budgets for {x.shape[0]} tokens", "give one per token of the flattened batch")
    return budget.reshape(-1).to(x.device, torch.float32)

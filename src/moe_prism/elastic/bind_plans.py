"""Bind skip plans to a model: check them, and find out what the model's router does to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UsageError
from ..routing import PlanIndex, RoutingPolicy, SkipPlan, routing_policies

if TYPE_CHECKING:
    from .runtime import Elastic

PROBE_TOKENS = 16
CONSTANT = 1e-2  # relative spread of a token's sum of weights up to which the router normalises them; wide enough for bfloat16


def policy_for(elastic: Elastic, routing: RoutingPolicy | SkipPlan | Sequence[SkipPlan]) -> RoutingPolicy:
    """The policy of one or more plans, checked against the model. A policy is taken as it is.

    Several plans are levels 0, 1, ... of one policy. Raises UsageError for plans of another model or of different policies.
    """
    if isinstance(routing, RoutingPolicy):
        return routing
    plans = [routing] if isinstance(routing, SkipPlan) else list(routing)
    for plan in plans:
        plan.check(len(elastic.layers), _experts(elastic))
    if any(plan.keep_mass is None for plan in plans):
        own = normalises(elastic)
        plans = [plan.with_(keep_mass=own) if plan.keep_mass is None else plan for plan in plans]
    return made(plans)


def _experts(elastic: Elastic) -> int | None:
    """k, where the configuration names it."""
    from .runtime import experts_per_token

    try:
        return experts_per_token(elastic.model, elastic.layers[0].plan.layer)
    except UsageError:
        return None


def made(plans: Sequence[SkipPlan]) -> RoutingPolicy:
    """The policy of plans that say themselves what happens to the weights."""
    names = {plan.policy for plan in plans}
    if len(names) > 1:
        raise UsageError(f"the plans are of different policies: {', '.join(sorted(names))}", "give plans of one policy")
    return routing_policies.get(names.pop() if names else "top-n")(plans)


class WeightRecorder(RoutingPolicy):
    """Lets everything pass and keeps the routing weights [T, k] of every layer it sees."""

    def __init__(self, layers: int) -> None:
        super().__init__([SkipPlan((1,) * layers)])
        self.weights: list[list[Tensor]] = [[] for _ in range(layers)]

    def is_neutral(self, layer: int, level: PlanIndex, k: int) -> bool:
        return False

    def kept(self, ranked: Tensor, layer: int, level: PlanIndex) -> Tensor:
        return torch.ones_like(ranked, dtype=torch.bool)

    def __call__(self, index: Tensor, weight: Tensor, layer: int, level: PlanIndex = 0) -> tuple[Tensor, Tensor]:
        self.weights[layer].append(weight.detach().float().abs().masked_fill(index < 0, -1.0).cpu())
        return index, weight

    def ranked(self) -> list[Tensor]:
        """[S, k] per layer, largest first; -1 where the router chose no expert."""
        return [torch.cat(rows).sort(dim=1, descending=True, stable=True).values for rows in self.weights]


@contextmanager
def recorded(elastic: Elastic) -> Iterator[WeightRecorder]:
    """Record the routing weights of what runs inside the block, at full budget and uncounted."""
    from .runtime import Setting

    recorder, before, counting = WeightRecorder(len(elastic.layers)), elastic.setting, elastic.counting
    elastic.setting, elastic.counting = Setting(rule="linear", routing=recorder), False
    try:
        yield recorder
    finally:
        elastic.setting, elastic.counting = before, counting


@torch.no_grad()
def normalises(elastic: Elastic) -> bool:
    """Whether the router scales the weights of its choice to a constant sum: such a model, run with fewer experts, would do so again.

    Asked of the model itself, on a few arbitrary tokens: configurations name it in many ways, or not at all.
    """
    size = elastic.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(elastic.model.device)
    with recorded(elastic) as recorder:
        elastic.model(input_ids=ids, use_cache=False)
    sums = [torch.cat(rows).clamp(min=0).sum(1) for rows in recorder.weights]
    return all(bool((s.max() - s.min()) <= CONSTANT * s.max()) for s in sums)

"""What an operating point costs: prices told by the storage times counts told by the execution. Tests compare with counted operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compress.changes import change_of
from ..elastic import Elastic
from ..elastic.bind import PointGroup, Step
from ..elastic.side_tensors import COMPENSATE, REPAIR


@dataclass(frozen=True)
class Cost:
    """Means per token over the whole model: weights the experts read, their bytes, and their FLOPs (2 per weight).

    Selection is included: the predictor of every chosen expert, and the gate neurons of blocks that are then dropped. So is what
    compensation reads for dropped slots. distinct_expert_bytes: read per forward, what several tokens read counted once. sends: devices
    that compute something for a token, per layer.
    """

    active_expert_params: float
    active_expert_bytes: float
    flops_per_token: float
    k_slots: float  # kept slots per token and layer
    distinct_expert_bytes: float = 0.0
    sends: float = 0.0


def measured_cost(elastic: Elastic, step: Step) -> Cost:
    """Cost of what ran in the last `elastic.count()`, all of it at one group of points."""
    params = size = slots = distinct = sends = 0.0
    group = _group(step)
    for layer in elastic.layers:
        counter, prices = layer.counter, layer.prices(group)
        tokens, batches = max(1, counter.tokens), max(1, counter.batches)
        weights, read = prices.total(counter.per_token)
        params += weights / tokens
        size += read / tokens
        distinct += prices.total(counter.per_batch)[1] / batches
        slots += counter.kept / tokens
        sends += counter.sends / tokens
    layers = len(elastic.layers)
    return Cost(params, size, 2 * params, slots / layers, distinct, sends / layers)


def resident_bytes(elastic: Elastic, step: Step) -> float:
    """Bytes of expert weights in memory at a point: the experts' own, and what its selection, compensation and repair read.

    At full budget only the experts count, since nothing else is read, and what stages hold. Experts that the point has removed do not
    count; of one that is a constant its vector does.
    """
    group, point = _group(step), step.bound.points[0]
    change = None if point.weights is None else change_of(point.weights)
    share = 1.0
    if change is not None and group.stored is None:  # the prices know nothing of experts that are not there
        share = change.resident_share
    every = [layer.parts.layer for layer in elastic.layers]
    total = 0.0 if change is None else change.resident_values * elastic.stored_bytes_per_weight
    for layer in elastic.layers:
        parts, prices = layer.parts, layer.prices(group).bytes
        if change is None and parts.layer.extra is not None:
            total += sum(parts.layer.extra.parameters) * elastic.stored_bytes_per_weight
        if group.extra is not None:
            total += sum(group.extra.parameters) * elastic.stored_bytes_per_weight
        own = prices["blocks"].sum(1) + prices["experts"]
        same = None if group.stored is None else group.stored[layer.index].same
        held = torch.ones_like(own, dtype=torch.bool)
        if same is not None:
            held = torch.zeros_like(held).index_fill(0, torch.unique(same), True)
        if change is not None and group.stored is not None and (there := change.experts_there(every, layer.index)) is not None:
            held &= there
        total += share * float(own[held].sum())
        if group.is_full(layer.index, 0):
            continue
        total += sum(float(prices[name].sum()) for name in ("predictors", "tokens") if name in prices)
        extra = [name for name in parts.tensors if name == REPAIR or (group.compensate and name.startswith(COMPENSATE))]
        total += sum(parts.tensors[name].numel() for name in extra) * elastic.stored_bytes_per_weight
    return total


def _group(step: Step) -> PointGroup:
    if len(step.bound.groups) != 1:
        raise ValueError("a cost is that of one group of points")
    return step.bound.groups[0]

"""What an operating point costs, from formulas; tests compare them with counted operations."""

from __future__ import annotations

from dataclasses import dataclass

from ..elastic import Elastic
from ..elastic.compensate.base import PREFIX
from ..elastic.repair import REPAIR
from ..elastic.runtime import ElasticLayer, Setting


@dataclass(frozen=True)
class Cost:
    """Means per token over the whole model: weights the experts read, their bytes, and their FLOPs (2 per weight).

    Selection is included: the predictor of every chosen expert, and the gate neurons of blocks that are then dropped. So is what
    compensation reads for dropped slots.
    """

    active_expert_params: float
    active_expert_bytes: float
    flops_per_token: float
    k_slots: float  # kept slots per token and layer


def measured_cost(elastic: Elastic, setting: Setting) -> Cost:
    """Cost of what has run since `elastic.reset_counters()`, all of it under `setting`."""
    params = size = slots = 0.0
    for layer in elastic.layers:
        tokens = max(1, layer.counter.tokens)
        here = _layer_params(layer, setting) / tokens
        params += here
        size += here * elastic.stored_bytes_per_weight
        slots += layer.counter.kept / tokens
    return Cost(params, size, 2 * params, slots / len(elastic.layers))


def resident_bytes(elastic: Elastic, setting: Setting, share: float = 1.0) -> float:
    """Bytes of expert weights in memory at a setting: a share of the experts' own, and what its selection, compensation and repair read.

    At full budget only the experts count, since nothing else is read.
    """
    total = 0.0
    for layer in elastic.layers:
        plan, expert = layer.plan, layer.plan.layer
        total += share * expert.num_experts * expert.parameters_per_expert()
        if setting.is_full(expert.index):
            continue
        if layer.rule(setting.rule).needs_norms:
            scorer = layer.scorer(setting.scorer)
            total += expert.num_experts * scorer.parameters_per_expert() + scorer.parameters_per_token()
        extra = [name for name in plan.tensors if name == REPAIR or (setting.compensate and name.startswith(PREFIX))]
        total += sum(plan.tensors[name].numel() for name in extra)
    return total * elastic.stored_bytes_per_weight


def _layer_params(layer: ElasticLayer, setting: Setting) -> float:
    """Weights read in all, over the tokens counted."""
    plan, counter, expert = layer.plan, layer.counter, layer.plan.layer
    matrices = 3 if expert.gate is not None else 2
    neuron_biases = sum(b is not None for b in (expert.gate_bias, expert.up_bias))
    per_block = plan.block * (matrices * expert.hidden + neuron_biases)
    total = counter.kept * per_block
    if expert.down_bias is not None:
        total += counter.touched * expert.hidden
    dropped = counter.chosen * plan.n_sub - counter.kept
    extra = layer.compensation(setting)
    if extra is not None and not setting.is_full(expert.index):
        total += extra.cost(counter.chosen, counter.touched, dropped)
    if setting.is_full(expert.index) or not layer.rule(setting.rule).needs_norms:
        return float(total)
    scorer = layer.scorer(setting.scorer)
    total += counter.chosen * scorer.parameters_per_expert() + counter.tokens * scorer.parameters_per_token()
    if scorer.reads_gates:
        total += dropped * plan.gates * ((matrices - 1) * expert.hidden + neuron_biases)
    return float(total)

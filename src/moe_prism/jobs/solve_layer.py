"""Everything that is fitted for one layer: neuron order, predictor, cutoffs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from ..calibrate.statistics import STARVED, LayerStatistics
from ..checkpoint.formats.requantize import TOGETHER
from ..elastic import LayerParts, compensate
from ..elastic.compensate import Compensator
from ..elastic.rules.threshold import QUANTILES, fit_cutoffs
from ..elastic.scorers import ridge as ridge_scorer
from ..elastic.scorers import scorers
from ..elastic.scorers.ridge_fit import held_out
from ..elastic.side_tensors import CUTOFFS, RIDGE, SHARES
from ..model import MoELayer
from ..options.refactor import RefactorOptions
from ..partition import Partition, objectives, order_gates, refiners, solvers
from ..partition import gates as gate_choices
from ..partition.base import Floats, Ints
from ..partition.parallel import solve_layer
from ..partition.weights import weight_fallback

PERM, IMPORTANCE, PRODUCTS = "perm", "importance", "products"
WORKING = (PERM, IMPORTANCE, PRODUCTS)
"""Tensors of a solved layer that the artefact does not hold."""
PER_THREAD = 8  # experts that are cut at a time


def solve(
    layer: MoELayer, statistics: LayerStatistics, options: RefactorOptions, unit: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of one layer whose weights are loaded; the weights are left in the new order.

    unit: so many neighbouring neurons move together; the best unit of a sub-expert comes first, and its first neurons are the gates.
    tensors: perm [E, f] int32, importance [E, f] (see `_importance`), products (see `_products`) where codes are rounded again, ridge,
    cutoffs, what compensation reads. facts: experts, width, cost_share (mean), starved experts.
    """
    samples, weights, starved = _samples(statistics, layer)
    orders = _Orders(layer, samples, weights, starved, options, unit).all()
    perm = np.stack([order.perm for order in orders])
    layer.permute(torch.from_numpy(perm))
    parts = LayerParts(layer, options.n_sub, options.gates)
    extra = None if options.compensate == "none" else _compensate(parts, statistics, samples, weights, options)
    fitted = ridge_scorer.fit(parts, samples, extra.losses if extra else None)
    parts.tensors[RIDGE] = fitted.weight
    for name in options.extra_scorers:
        parts.tensors |= scorers.get(name).fit(parts, samples)
    parts.tensors[CUTOFFS] = _cutoffs(statistics, [held_out(len(x)) for x in samples.kept], fitted.held)
    parts.tensors[SHARES] = torch.linspace(0, 1, QUANTILES)
    facts = {
        "name": layer.name,
        "experts": layer.num_experts,
        "width": layer.width,
        "cost_share": round(float(np.mean([order.share for order in orders])), 6),
        "starved": starved,
    }
    again = {PRODUCTS: _products(layer, samples, weights)} if options.keep == "format" else {}
    return {
        PERM: torch.from_numpy(perm.astype(np.int32)),
        IMPORTANCE: torch.from_numpy(np.stack([order.importance for order in orders])),
        **again,
        **parts.tensors,
    }, facts


class _Order(NamedTuple):
    """Of one expert: perm [f], importance [f] in that order (see `_importance`), and the share of the mass that is dropped."""

    perm: Ints
    importance: Floats
    share: float


class _Orders(NamedTuple):
    """Finds a layer's orders, for some experts at a time: their activations over the whole sample are the largest thing there is then."""

    layer: MoELayer
    samples: Sequence[Tensor]
    weights: list[Tensor]
    starved: list[int]
    options: RefactorOptions
    unit: int

    def all(self) -> list[_Order]:
        """Of every expert."""
        threads = torch.get_num_threads()  # as many as products take: several processes that share a machine have divided them
        norms = self.layer.down.float().norm(dim=1).numpy()  # [E, f]
        together = experts_together()
        firsts = range(0, self.layer.num_experts, together)
        some = [range(first, min(first + together, self.layer.num_experts)) for first in firsts]
        return [order for experts in some for order in self._of(experts, norms, threads)]

    def _of(self, experts: range, norms: Floats, threads: int) -> list[_Order]:
        layer, samples, weights, _, options, unit = self
        dropped = options.dropped or options.n_sub - 1
        mass = {e: layer.activations(e, samples[e]).abs().float().numpy() for e in experts}
        objective = objectives.get(options.objective)
        wanted = {e: _united(objective(mass[e], weights[e].numpy(), norms[e]), unit) for e in experts}
        cut = partial(solvers.get(options.solver), n_sub=options.n_sub, dropped=dropped)
        partitions = solve_layer(wanted, cut, layer=layer.index, seed=options.seed, threads=threads)
        if options.objective in refiners.names():
            partitions = _refine(layer, partitions, samples, weights, options, dropped)
        choice, gates = gate_choices.get(options.gate_choice), options.gates if unit == 1 else min(1, options.gates)
        found = []
        for e in experts:
            order = self._by_weights(e) if e in self.starved else partitions[e].perm
            units = order_gates(_united(mass[e], unit), order, options.n_sub, gates, choice, _norms(norms[e], unit))
            perm = _neurons(units, unit)
            share = partitions[e].cost / max(float(wanted[e].sum(dtype=np.float64)), 1e-30)
            found.append(_Order(perm, _importance(mass[e], weights[e], perm), share))
        return found

    def _by_weights(self, expert: int) -> Ints:
        """The order of an expert that too few tokens reached."""
        layer = self.layer
        if self.unit > 1:  # weights say little of a group's neurons together: they keep their order
            return np.arange(layer.width // self.unit, dtype=np.int32)
        up = layer.up[expert].float().numpy()
        return weight_fallback(_rows(layer.gate, expert), up, self.options.n_sub, self.options.seed).perm


def experts_together(threads: int | None = None) -> int:
    """How many experts of a layer are cut at a time: enough to keep all threads at work. threads: of a machine that is not this one."""
    return PER_THREAD * (threads or torch.get_num_threads())


def measured_cutoffs(parts: LayerParts, statistics: LayerStatistics) -> Tensor:
    """Cutoffs [129] of a layer that has its predictor, whose weights are loaded, on all rows of the sample."""
    samples, scorer = _samples(statistics, parts.layer)[0], ridge_scorer.Ridge(parts)
    norms = [scorer(x, torch.full((len(x), 1), e))[:, 0] for e, x in enumerate(samples)]
    return _cutoffs(statistics, [torch.arange(len(x)) for x in samples.kept], norms)


def _importance(mass: Floats, weight: Tensor, order: Ints) -> Floats:
    """What an error in a neuron's output weights counts, [f] in the new order: root mean square of activation x routing weight.

    Its square, the energy, gave a larger KL (docs/developer/log.md). A neuron that is silent on this text still counts a little.
    """
    rms = np.sqrt(np.square(mass * weight.abs().numpy()[:, None]).mean(0))[order]
    return np.maximum(rms, 0.01 * rms.mean() + 1e-12).astype(np.float32)  # type: ignore[no-any-return]


def _products(layer: MoELayer, samples: Sequence[Tensor], weights: list[Tensor]) -> Tensor:
    """Means of h_i h_j, h = activation x routing weight, of TOGETHER neighbours in the layer's order: [E, ceil(f / 32), 32, 32]."""
    found = []
    for e, (x, weight) in enumerate(zip(samples, weights, strict=True)):
        used = layer.activations(e, x).float() * weight[:, None]
        padded = torch.nn.functional.pad(used, (0, -layer.width % TOGETHER))
        blocks = padded.reshape(len(used), -1, TOGETHER).movedim(0, 1)
        found.append(blocks.mT @ blocks / max(1, len(x)))
    return torch.stack(found)


def _united(mass: Floats, unit: int) -> Floats:
    """[T, f] -> [T, f / unit]: what neighbouring neurons have together."""
    return mass if unit == 1 else mass.reshape(len(mass), -1, unit).sum(-1)


def _norms(down: Floats, unit: int) -> Floats:
    """[f] -> [f / unit]: root mean squares."""
    return down if unit == 1 else np.sqrt(np.square(down).reshape(-1, unit).mean(-1)).astype(np.float32)


def _neurons(order: Ints, unit: int) -> Ints:
    """An order of units as one of neurons."""
    inside = np.arange(unit, dtype=np.int32)
    return (order[:, None] * np.int32(unit) + inside).reshape(-1).astype(np.int32)


def _refine(
    layer: MoELayer,
    partitions: dict[int, Partition],
    samples: Sequence[Tensor],
    weights: list[Tensor],
    options: RefactorOptions,
    dropped: int,
) -> dict[int, Partition]:
    """The partitions after the objective's own refinement on signed activations times routing weight."""
    refine, better = refiners.get(options.objective), {}
    for e, partition in partitions.items():
        signed = (layer.activations(e, samples[e]).float() * weights[e][:, None]).numpy()
        better[e] = refine(partition, signed, layer.down[e].float().numpy(), options.n_sub, dropped)
    return better


class _Inputs(Sequence[Tensor]):
    """Inputs [S_e, d] of every expert as they are kept. One's are widened when they are asked for: all of them would be a second sample."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> list[Tensor]: ...
    def __getitem__(self, at: int | slice) -> Tensor | list[Tensor]:
        return self.kept[at].float() if isinstance(at, int) else [x.float() for x in self.kept[at]]


def _samples(statistics: LayerStatistics, layer: MoELayer) -> tuple[_Inputs, list[Tensor], list[int]]:
    """Inputs [S_e, d] and routing weights [S_e] per expert, and which experts are starved.

    Those borrow rows of the best fed expert until they have STARVED. Where calibration reached none (experts for images), all take noise.
    """
    pairs = [statistics.stored_inputs(e) for e in range(len(statistics.kept()))]
    richest = max(pairs, key=lambda pair: len(pair[0]))
    if not len(richest[0]):
        noise = torch.randn(STARVED, layer.hidden, generator=torch.Generator().manual_seed(layer.index))
        richest = noise, torch.ones(STARVED)
    least = min(STARVED, len(richest[0]))
    starved = [e for e, (x, _) in enumerate(pairs) if len(x) < least]
    for e in starved:
        x, weight = pairs[e]
        missing = least - len(x)
        pairs[e] = torch.cat([x, richest[0][:missing]]), torch.cat([weight, richest[1][:missing]])
    return _Inputs([x for x, _ in pairs]), [weight for _, weight in pairs], starved


def _compensate(
    parts: LayerParts, statistics: LayerStatistics, samples: _Inputs, weights: list[Tensor], options: RefactorOptions
) -> Compensator:
    """Fit compensation on the weaker half of the layer's slots, and put its tensors into the parts."""
    true = [ridge_scorer.block_norms(parts, x, e) for e, x in enumerate(samples)]
    half = _cutoffs(statistics, [torch.arange(len(x)) for x in samples.kept], true)[QUANTILES // 2]
    dropped = [weight.abs()[:, None] * norms < half for weight, norms in zip(weights, true, strict=True)]
    rows = [compensate.ExpertSample(x, mask) for x, mask in zip(samples.kept, dropped, strict=True)]
    return compensate.fit(options.compensate, parts, rows, options.rank)


def _rows(weight: Tensor | None, expert: int) -> Any:
    return None if weight is None else weight[expert].float().numpy()


def _cutoffs(statistics: LayerStatistics, rows: list[Tensor], norms: list[Tensor]) -> Tensor:
    """Levels for the threshold rule: slot values of each expert's sample, weighted by how often the expert is chosen.

    rows [S] of the sample and norms [S, N] of each expert; rows beyond its own are borrowed ones, and do not count.
    """
    values, importance = [], []
    for e, (mine, norm) in enumerate(zip(rows, norms, strict=True)):
        _, weight = statistics.stored_inputs(e)
        own = mine < len(weight)
        if own.any():
            values.append((weight[mine[own]].abs()[:, None] * norm[own]).flatten())
            importance.append(torch.full_like(values[-1], float(statistics.values["counts"]["count"][e]) / int(own.sum())))
    if not values:  # no token came here
        return fit_cutoffs(torch.zeros(1), torch.ones(1))
    return fit_cutoffs(torch.cat(values), torch.cat(importance))

"""That methods cost what they read: their points' counted bytes and weights against sums made by hand."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.bands import BandChange, bands
from moe_prism.elastic.bind import Step, bind
from moe_prism.frontier.cost import measured_cost, resident_bytes
from moe_prism.model import MoELayer
from moe_prism.point import FULL, OperatingPoint

from .bench import Bench
from .operations import counted, distinct_rows, expected, passing


@torch.no_grad()
def costs_what_it_reads(bench: Bench, asked: str) -> None:
    """Per token, and of the batch together: bytes to the last one, FLOPs two per weight."""
    elastic, tokens = bench.opened.elastic, 48
    ids = distinct_rows(bench.opened.model, tokens)
    for named in (bench.points(asked)[0], bench.points(asked)[-1]):
        step = Step(bind(elastic, [named.point]))
        with elastic.at(step), elastic.count(), counted(elastic) as found:
            bench.opened.model(input_ids=ids)
            cost = measured_cost(elastic, step)
        per_token, distinct = expected(elastic, tokens, found)
        assert cost.active_expert_bytes == pytest.approx(per_token, rel=1e-12)
        assert cost.distinct_expert_bytes == pytest.approx(distinct, rel=1e-12)
        assert cost.flops_per_token == pytest.approx(2 * per_token / elastic.stored_bytes_per_weight, rel=1e-12)


@torch.no_grad()
def costs_what_its_widths_read(bench: Bench, asked: str) -> None:
    """Of slots with widths of their own: the bytes of every slot's planes, and of what choosing and making up read."""
    elastic, tokens = bench.opened.elastic, 48
    ids = distinct_rows(bench.opened.model, tokens)
    for named in (bench.points(asked)[0], bench.points(asked)[-1]):
        bits, step = named.point.slots.bits, Step(bind(elastic, [named.point]))
        size, total = elastic.stored_bytes_per_weight, 0.0
        widths: list[torch.Tensor] = []
        with elastic.at(step), elastic.count(), ExitStack() as stack:
            for layer in elastic.layers:
                run = layer.executor.run_at

                def seen(coded, x, index, weight, settled, run=run, widths=widths):
                    widths.append(settled.widths)
                    return run(coded, x, index, weight, settled)

                stack.enter_context(mock.patch.object(layer.executor, "run_at", seen))
            bench.opened.model(input_ids=ids)
            cost = measured_cost(elastic, step)
        for layer, found in zip(elastic.layers, widths, strict=True):
            parts = layer.parts
            row = {w: Nested().bytes((parts.layer.hidden,), w, bits.group) for w in bits.widths}
            matrices = 3 if parts.layer.gate is not None else 2
            gates = parts.gates * (matrices - 1)
            kept = {w: int((found == w).sum()) for w in bits.widths}
            total += sum(
                n * (parts.block * matrices * row[w] + gates * max(0, row[bits.choosing] - row[w])) for w, n in kept.items()
            )
            if bits.router is not None:  # a row of float16 per choice; nothing is dropped
                total += 2 * found[:, :, 0].numel() * (parts.layer.hidden + 1)
                assert found.numel() == sum(kept.values())
                continue
            dropped = found.numel() - sum(kept.values())
            total += dropped * (
                gates * row[bits.choosing] + (layer.compensator.parameters()[0] * size if layer.compensator else 0)
            )
            total += found[:, :, 0].numel() * layer.scorer(named.point.slots.scorer).parameters_per_expert() * size
        assert cost.active_expert_bytes == pytest.approx(total / tokens, rel=1e-12)
        assert cost.distinct_expert_bytes < cost.active_expert_bytes * tokens


@torch.no_grad()
def costs_what_passes_its_cutoff(bench: Bench, asked: str) -> None:
    """Of a stage that leaves out neurons: every gate, and two rows more where |silu(gate)| reaches the cutoff; and what is computed so."""
    elastic, tokens, point = bench.opened.elastic, 24, bench.points(asked)[-1].point
    step = Step(bind(elastic, [point]))
    with elastic.at(step), elastic.count(), ExitStack() as stack:
        seen: list[tuple[Any, ...]] = []
        for layer in elastic.layers:
            run = layer.executor.run_above

            def watched(x, index, weight, settled, run=run, layer=layer, seen=seen):
                seen.append((layer, x, index, weight, settled, run(x, index, weight, settled)))
                return seen[-1][-1]

            stack.enter_context(mock.patch.object(layer.executor, "run_above", watched))
        bench.opened.model(input_ids=distinct_rows(bench.opened.model, tokens))
        cost = measured_cost(elastic, step)
    per_token, distinct = passing(seen)
    size = elastic.stored_bytes_per_weight
    assert cost.active_expert_bytes == pytest.approx(per_token * size / tokens, rel=1e-12)
    assert math.isnan(distinct) or cost.distinct_expert_bytes == pytest.approx(distinct * size, rel=1e-12)


@torch.no_grad()
def costs_what_its_vectors_read(bench: Bench, asked: str) -> None:
    """Of a stage that multiplies inside experts: the experts that run whole, and the vectors of those that are skipped."""
    elastic, tokens, point = bench.opened.elastic, 24, bench.points(asked)[-1].point
    step, size = Step(bind(elastic, [point])), elastic.stored_bytes_per_weight
    total = distinct = 0.0
    with elastic.at(step), elastic.count(), ExitStack() as stack:
        seen: list[tuple[Any, ...]] = []
        for layer in elastic.layers:
            run = layer.executor.run_scaled

            def watched(x, index, weight, settled, run=run, layer=layer, seen=seen):
                seen.append((layer.parts.layer, index))
                return run(x, index, weight, settled)

            stack.enter_context(mock.patch.object(layer.executor, "run_scaled", watched))
        bench.opened.model(input_ids=distinct_rows(bench.opened.model, tokens))
        cost = measured_cost(elastic, step)
    assert seen
    for layer, index in seen:
        runs, skipped = (index >= 0) & (index < layer.num_experts), index >= layer.num_experts
        vectors = 2 * layer.hidden + layer.width
        total += int(runs.sum()) * layer.parameters_per_expert() + int(skipped.sum()) * vectors
        distinct += len(index[runs].unique()) * layer.parameters_per_expert() + len(index[skipped].unique()) * vectors
    assert cost.active_expert_bytes == pytest.approx(total * size / tokens, rel=1e-12)
    assert cost.distinct_expert_bytes == pytest.approx(distinct * size, rel=1e-12)


@torch.no_grad()
def costs_what_its_codec_stores(bench: Bench, asked: str) -> None:
    """Of a change that stores experts otherwise: a token reads its k experts, each as many bytes as its planes have."""
    elastic = bench.opened.elastic
    ids = distinct_rows(bench.opened.model, 48)
    for named in (bench.points(asked)[0], bench.points(asked)[-1]):
        own = [layer.parts.layer for layer in elastic.layers]
        change = change_of(named.point.weights)
        sizes = [
            torch.tensor([_stored_bytes(layer, e, change, bits, elastic.stored_bytes_per_weight) for e, bits in enumerate(row)])
            for layer, row in zip(own, change.widths(own), strict=True)
        ]
        seen: list[torch.Tensor] = []
        for layer, size in zip(elastic.layers, sizes, strict=True):
            layer.on_kept = lambda index, _, size=size, seen=seen: seen.append(size[index].sum() / len(index))
        try:
            step = Step(bind(elastic, [named.point]))
            with elastic.at(step), elastic.count():
                bench.opened.model(input_ids=ids)
                assert measured_cost(elastic, step).active_expert_bytes == pytest.approx(float(sum(seen)), rel=1e-6)
        finally:
            for layer in elastic.layers:
                layer.on_kept = None


def read_by_hand(bench: Bench, point: OperatingPoint) -> tuple[Any, tuple[float, float]]:
    """(cost that is told, bytes per token and of the batch that were read), without neurons that are not there.

    The readable scorer asks expert 0 in the place of those that are skipped: only what a token was given counts.
    """
    elastic, tokens = bench.opened.elastic, 48
    step, given = Step(bind(elastic, [point])), []
    masks = change_of(point.weights).masks([layer.parts.layer for layer in elastic.layers])
    for layer in elastic.layers:
        layer.on_kept = lambda index, _: given.append({(t, e) for t, row in enumerate(index.tolist()) for e in row})
    try:
        with elastic.at(step), elastic.count(), counted(elastic) as found:
            bench.opened.model(input_ids=distinct_rows(bench.opened.model, tokens))
            cost = measured_cost(elastic, step)
    finally:
        for layer in elastic.layers:
            layer.on_kept = None
    for reads, mask, own in zip(found, masks, given, strict=True):
        reads.up = {entry for entry in reads.up if mask[entry[1], entry[2]] and entry[:2] in own}
        reads.down = {entry for entry in reads.down if mask[entry[1], entry[2]]}
        reads.predictor &= own
    return cost, expected(elastic, tokens, found)


@torch.no_grad()
def costs_what_its_neurons_read(bench: Bench, asked: str) -> None:
    """Of a change that removes neurons: those that are there are read, by every token and by the batch together; and held in memory."""
    elastic = bench.opened.elastic
    for named in bench.points(asked):
        cost, (per_token, distinct) = read_by_hand(bench, named.point)
        assert cost.active_expert_bytes == pytest.approx(per_token, rel=1e-12)
        assert cost.distinct_expert_bytes == pytest.approx(distinct, rel=1e-12)
        assert cost.flops_per_token == pytest.approx(2 * per_token / elastic.stored_bytes_per_weight, rel=1e-12)
        full, held = (resident_bytes(elastic, Step(bind(elastic, [p]))) for p in (FULL, named.point))
        assert held == pytest.approx(full * change_of(named.point.weights).resident_share, rel=1e-12)


@torch.no_grad()
def costs_what_is_left_of_experts(bench: Bench, asked: str) -> None:
    """Of a change that shares weights, stores them otherwise, removes neurons, or all of it: bytes of a token, of a batch, which
    reads what is shared once, and of memory.
    """
    elastic, tokens = bench.opened.elastic, 48
    for named in bench.points(asked)[:3]:
        plain = named.point.slots == FULL.slots
        for point in (named.point, replace(named.point, slots=FULL.with_budget(0.5, "product").slots))[: 2 if plain else 1]:
            change, step = change_of(point.weights), Step(bind(elastic, [point]))
            with elastic.at(step), elastic.count(), counted(elastic) as found:
                bench.opened.model(input_ids=distinct_rows(bench.opened.model, tokens))
                cost = measured_cost(elastic, step)
            each = [_left(elastic, change, number, reads) for number, reads in enumerate(found)]
            assert cost.active_expert_bytes == pytest.approx(sum(own for own, _, _ in each) / tokens, rel=1e-9)
            assert cost.distinct_expert_bytes == pytest.approx(sum(own for _, own, _ in each), rel=1e-9)
        held = resident_bytes(elastic, Step(bind(elastic, [replace(named.point, slots=FULL.slots)])))
        assert held == pytest.approx(sum(own for _, _, own in each), rel=1e-9)


def _left(elastic: Any, change: Any, number: int, reads: Any) -> tuple[float, float, float]:
    """(bytes that all tokens read, that the batch reads, that are in memory) of a layer under a change."""
    layers, stored = [layer.parts.layer for layer in elastic.layers], elastic.stored_bytes_per_weight
    own = layers[number]
    size = change.bytes_per_weight(layers, number, stored)
    size = [stored] * own.num_experts if size is None else size.tolist()
    there, same = change.neurons_there(layers, number), change.same_weights(layers, number)
    mask = torch.ones(own.num_experts, own.width, dtype=torch.bool) if there is None else there
    one = list(range(own.num_experts)) if same is None else same.tolist()
    rows, biases = (2 if own.gate is not None else 1) * own.hidden, sum(b is not None for b in (own.gate_bias, own.up_bias))

    def price(kind: str, e: int) -> float:
        if kind == "up":
            return rows * size[e] + biases * stored
        return own.hidden * size[e] if kind == "down" else reads.sizes.get(kind, 0) * stored

    def both(kind: str) -> tuple[set[Any], set[Any]]:
        entries = {row for row in getattr(reads, kind) if kind not in ("up", "down") or mask[row[1], row[2]]}
        if kind in ("predictor", "means"):
            return entries, {row[1:] for row in entries}
        return entries, {(one[row[1]], *row[2:]) for row in entries}

    kinds = [(kind, *both(kind)) for kind in ("up", "down", "bias", "predictor", "means")]
    of_tokens = sum(price(kind, row[1]) for kind, every, _ in kinds for row in every)
    of_batch = sum(price(kind, row[0]) for kind, _, every in kinds for row in every)
    gone = change.experts_there(layers, number)
    held = [e for e in sorted(set(one)) if gone is None or gone[e]]
    bias = 0 if own.down_bias is None else own.hidden * stored
    memory = sum(int(mask[e].sum()) * (price("up", e) + price("down", e)) + bias for e in held)
    return of_tokens, of_batch, memory


def _stored_bytes(layer: MoELayer, expert: int, change: QuantizeChange | BandChange, bits: Any, stored: float) -> float:
    """Of one expert, by encoding it; biases stay as they are. bits: of the expert, or of each of its neurons."""
    own = [w[expert : expert + 1].detach() for w in (layer.gate, layer.up, layer.down) if w is not None]
    biases = layer.parameters_per_expert() - sum(w.numel() for w in own)
    if isinstance(change, BandChange):
        return sum(band.bytes for band in bands(own, [bits[None]] * len(own), change.codec, change.group)) + biases * stored
    return sum(change.codec.encode(w, bits, change.group).bytes(bits) for w in own) + biases * stored

"""What every method of the catalogue must do, whatever it is: checks that can be called for a name, registered or about to be.

Neutral is exact; JSON round trip; the same KL when run again from frontier.json; alone = in a mixed batch; cost equals what was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_prism.artefact.open import Opened, open_model
from moe_prism.catalogue import methods
from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.prune import Criterion
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.bands import BandChange, bands
from moe_prism.elastic import Rule
from moe_prism.elastic.bind import Step, bind
from moe_prism.frontier.cost import measured_cost, resident_bytes
from moe_prism.jobs.frontier import evaluation_windows, measure_frontier, subject_of
from moe_prism.methods.find import PRUNE, method
from moe_prism.methods.merge.base import MergeMethod
from moe_prism.methods.neurons.base import NeuronMethod
from moe_prism.model import MoELayer
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, NamedPoint, OperatingPoint, RoutingStage, SlotRule
from moe_prism.routing import stage_class

from .operations import counted, distinct_rows, expected, passing

OPTIONS: dict[str, Any] = {"tokens": 256, "length": 32, "calibration_tokens": 256, "per_method": 3}


@dataclass
class Bench:
    """A refactored model that is tried on, and a text. `points` makes a method's points once."""

    folder: Path
    text: Path
    opened: Opened = field(init=False)
    known: dict[str, list[NamedPoint]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.opened = open_model(self.folder)
        self.subject = subject_of(self.opened, self.options())

    def options(self, **more: Any) -> FrontierOptions:
        return FrontierOptions(text=str(self.text), **OPTIONS, **more)

    def points(self, asked: str) -> list[NamedPoint]:
        if asked not in self.known:
            self.known[asked] = list(method(asked).points(self.subject))
        return self.known[asked]

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, step: Step | Sequence[OperatingPoint]) -> torch.Tensor:
        with self.opened.elastic.at(step):
            return self.opened.model(input_ids=ids).logits


Check = Callable[[Bench, str], None]
"""Of a bench and what a user writes to try the method."""


def asked_for(name: str) -> str:
    """What a user writes to try a method of the catalogue."""
    found = methods.get(name)
    if issubclass(found, Criterion):
        return f"{PRUNE}:{name}"
    text = None if issubclass(found, Rule) else found.example()
    return name if text is None else f"{name}:{text}"


def checks_of(name: str) -> list[Check]:
    """All that a method of the catalogue must pass; `runs_again_from_its_file` beside them, which takes many at once."""
    found = methods.get(name)
    if issubclass(found, Criterion):
        return [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were]
    if issubclass(found, NeuronMethod):
        checks = [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were, costs_what_its_neurons_read]
        alike = [
            composes_with_slots_and_skipping,
            removes_nothing_where_all_stay,
        ]  # they share the change: tried with one of them
        return [*checks, *(alike if name == "heapr" else [])]
    if issubclass(found, MergeMethod):
        shared = [] if name == "dern" else [costs_what_is_left_of_experts]
        return [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were, *shared]
    if found.acts == "weights":
        return [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were, costs_what_its_codec_stores]
    checks: list[Check] = [has_points_that_survive_json, changes_the_output]
    if getattr(found, "leaves_out_neurons", False):
        checks.append(costs_what_passes_its_cutoff)
    else:
        checks.append(costs_what_its_widths_read if getattr(found, "maker", "") else costs_what_it_reads)
    if not getattr(found, "depends_on_batch", False):
        checks += [is_the_same_alone_and_beside_any_other, looks_at_no_later_token]
    if issubclass(found, Rule):
        checks.append(is_exact_when_it_keeps_all)
    elif found.stage is not None:
        checks.append(is_exact_at_its_neutral_values)
    return checks


def has_points_that_survive_json(bench: Bench, asked: str) -> None:
    points = bench.points(asked)
    assert points and len({p.name for p in points}) == len(points)
    for named in points:
        assert OperatingPoint.from_json(named.point.to_json()) == named.point
        assert named.point != FULL or named.point.is_full


def changes_the_output(bench: Bench, asked: str) -> None:
    """A point is full, or it does something: a stage that takes its own values for neutral ones would never be called."""
    ids = distinct_rows(bench.opened.model, 24)
    full = bench.logits(ids, [FULL])
    changed = [not torch.equal(bench.logits(ids, [named.point]), full) for named in bench.points(asked)]
    assert any(changed)


def is_exact_when_it_keeps_all(bench: Bench, asked: str) -> None:
    """Of a rule, by the long way too."""
    ids, elastic = distinct_rows(bench.opened.model, 24), bench.opened.elastic
    source = bench.logits(ids, [FULL])
    elastic.always_split = True
    try:
        found = bench.logits(ids, [OperatingPoint(slots=SlotRule(budget=1.0, rule=asked))])
    finally:
        elastic.always_split = False
    torch.testing.assert_close(found, source, rtol=1e-5, atol=1e-5 * float(source.abs().max()))


def is_exact_at_its_neutral_values(bench: Bench, asked: str) -> None:
    """Of a routing stage, by its name."""
    elastic, name = bench.opened.elastic, asked.partition(":")[0]
    neutral = stage_class(name).neutral(name, len(elastic.layers), elastic.k)
    assert RoutingStage.from_json(neutral.to_json()) == neutral
    ids = distinct_rows(bench.opened.model, 24)
    assert torch.equal(bench.logits(ids, [OperatingPoint(routing=(neutral,))]), bench.logits(ids, [FULL]))


def is_the_same_alone_and_beside_any_other(bench: Bench, asked: str) -> None:
    """Beside points of other methods too, all rows of one batch."""
    mine = [bench.points(asked)[0].point, bench.points(asked)[-1].point]
    others = [FULL, FULL.with_budget(0.5), bench.points("uniform")[-1].point, bench.points("product")[0].point]
    every = [*mine, *others]
    ids = distinct_rows(bench.opened.model, 24 * len(every)).view(len(every), 24)
    which = torch.arange(len(every)).repeat_interleave(24)
    mixed = bench.logits(ids, Step(bind(bench.opened.elastic, every), which))
    for row, point in enumerate(every):
        alone = bench.logits(ids[row : row + 1], [point])[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
        assert torch.equal(mixed[row].argmax(-1), alone.argmax(-1))


def looks_at_no_later_token(bench: Bench, asked: str) -> None:
    """Other tokens at the end of a text change nothing before them."""
    ids = distinct_rows(bench.opened.model, 36)
    one, other = ids[:, :24], torch.cat([ids[:, :16], ids[:, 24:32]], 1)
    for named in (bench.points(asked)[0], bench.points(asked)[-1]):
        first, second = (bench.logits(rows, [named.point])[:, :16] for rows in (one, other))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5 * float(first.abs().max()))


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


def changes_weights_and_leaves_them_as_they_were(bench: Bench, asked: str) -> None:
    """Of a pruning criterion: inside the block the model is another one, after it the very same."""
    ids = distinct_rows(bench.opened.model, 24)
    before = bench.logits(ids, [FULL])
    for named in bench.points(asked):
        change = change_of(named.point.weights)
        assert change.part() == named.point.weights and 0 < change.resident_share < 1
        assert not torch.equal(bench.logits(ids, [named.point]), before)
        assert torch.equal(bench.logits(ids, [FULL]), before)


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


def _read(bench: Bench, point: OperatingPoint) -> tuple[Any, tuple[float, float]]:
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
        cost, (per_token, distinct) = _read(bench, named.point)
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


@torch.no_grad()
def composes_with_slots_and_skipping(bench: Bench, asked: str) -> None:
    """Fewer neurons with fewer slots, fewer experts, or both: the price is what is read, and both cost less than each."""
    fewer = bench.points(asked)[-1].point
    slots, routing = FULL.with_budget(0.5, "product").slots, bench.points("uniform")[0].point.routing
    told = []
    for parts in ({"slots": slots}, {"routing": routing}, {"slots": slots, "routing": routing}):
        cost, (per_token, distinct) = _read(bench, replace(fewer, **parts))
        assert cost.active_expert_bytes == pytest.approx(per_token, rel=1e-12)
        assert cost.distinct_expert_bytes == pytest.approx(distinct, rel=1e-12)
        told.append(cost.active_expert_bytes)
    assert told[2] < min(told[:2])


@torch.no_grad()
def removes_nothing_where_all_stay(bench: Bench, asked: str) -> None:
    """The neutral share is exact, under sub-experts and skipping too."""
    (full,) = bench.points(f"{asked.partition(':')[0]}:1")
    assert change_of(full.point.weights).resident_share == 1
    ids = distinct_rows(bench.opened.model, 24)
    for beside in (FULL, FULL.with_budget(0.5, "threshold"), bench.points("uniform")[0].point):
        there = OperatingPoint(weights=full.point.weights, slots=beside.slots, routing=beside.routing)
        assert torch.equal(bench.logits(ids, [there]), bench.logits(ids, [beside]))


def _stored_bytes(layer: MoELayer, expert: int, change: QuantizeChange | BandChange, bits: Any, stored: float) -> float:
    """Of one expert, by encoding it; biases stay as they are. bits: of the expert, or of each of its neurons."""
    own = [w[expert : expert + 1].detach() for w in (layer.gate, layer.up, layer.down) if w is not None]
    biases = layer.parameters_per_expert() - sum(w.numel() for w in own)
    if isinstance(change, BandChange):
        return sum(band.bytes for band in bands(own, [bits[None]] * len(own), change.codec, change.group)) + biases * stored
    return sum(change.codec.encode(w, bits, change.group).bytes(bits) for w in own) + biases * stored


def runs_again_from_its_file(bench: Bench, asked: Sequence[str], file: Path) -> None:
    """Methods on one frontier, written to the file, read and measured again: the same KL to 1e-9, the same bytes."""
    options = bench.options(methods=tuple(asked))
    first = measure_frontier(bench.folder, options)
    first.save(file)
    again = measure_frontier(bench.folder, bench.options(given=(str(file),)))
    known = {p.name: p for p in [*again.points, *again.baseline_topk]}
    assert {p.name for p in first.points if not p.point.is_full} <= set(known)
    for p in [*first.points, *first.baseline_topk]:
        if not p.point.is_full:
            assert known[p.name].kl == pytest.approx(p.kl, abs=1e-9)
            assert known[p.name].active_expert_bytes == pytest.approx(p.active_expert_bytes, rel=1e-12)
    assert evaluation_windows(bench.opened.tokenizer, bench.opened.documents, options).tokens >= 256

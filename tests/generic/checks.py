"""What every method of the catalogue must do, whatever it is: checks that can be called for a name, registered or about to be.

Neutral is exact; JSON round trip; the same KL when run again from frontier.json; alone = in a mixed batch; cost equals what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_prism.catalogue import methods
from moe_prism.compress.changes import change_of
from moe_prism.compress.prune import Criterion
from moe_prism.elastic import Rule
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.rules.widths import WidthRule
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import evaluation_windows, measure_frontier
from moe_prism.jobs.generate import generate
from moe_prism.methods.find import PRUNE
from moe_prism.methods.merge.base import MergeMethod
from moe_prism.methods.mixed import LayerMix
from moe_prism.methods.neurons.base import NeuronMethod
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL, Decoding, OperatingPoint, RoutingStage, SlotRule
from moe_prism.routing import stage_class

from .bench import Bench
from .costs import (
    costs_what_is_left_of_experts,
    costs_what_it_reads,
    costs_what_its_codec_stores,
    costs_what_its_neurons_read,
    costs_what_its_vectors_read,
    costs_what_its_widths_read,
    costs_what_passes_its_cutoff,
    read_by_hand,
)
from .operations import distinct_rows

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
    if issubclass(found, LayerMix):
        return [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were, costs_what_is_left_of_experts]
    if issubclass(found, MergeMethod):
        shared = [] if name == "dern" else [costs_what_is_left_of_experts]
        return [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were, *shared]
    if found.acts == "decoding":
        return [has_points_that_survive_json, decodes_plainly_at_its_neutral_settings, is_refused_where_single_forwards_run]
    if found.acts == "weights":
        return [has_points_that_survive_json, changes_weights_and_leaves_them_as_they_were, costs_what_its_codec_stores]
    checks: list[Check] = [has_points_that_survive_json, changes_the_output]
    if getattr(found, "leaves_out_neurons", False):
        checks.append(costs_what_passes_its_cutoff)
    elif getattr(found, "multiplies_inside", False):
        checks.append(costs_what_its_vectors_read)
    else:
        checks.append(costs_what_its_widths_read if issubclass(found, WidthRule) else costs_what_it_reads)
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


def decodes_plainly_at_its_neutral_settings(bench: Bench, asked: str) -> None:
    """Of a method of decoding: the tokens of transformers, one forward each."""
    name, sampling = asked.partition(":")[0], GenerateOptions(max_tokens=12)
    opened, neutral = bench.opened, methods.get(asked.partition(":")[0]).neutral
    point = OperatingPoint(decoding=Decoding(method=name, settings=neutral))
    for prompt in ("import os", "def f(x):\n", "x"):
        plain = generate(opened.model, opened.tokenizer, prompt, sampling=sampling)
        assert generate(opened.model, opened.tokenizer, prompt, point=point, sampling=sampling).text == plain.text


def is_refused_where_single_forwards_run(bench: Bench, asked: str) -> None:
    """By its name, and never as if it were not there."""
    (named,) = bench.points(asked)
    with pytest.raises(UsageError, match=f"'{asked.partition(':')[0]}' decodes a request"):
        bind(bench.opened.elastic, [named.point])


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
def composes_with_slots_and_skipping(bench: Bench, asked: str) -> None:
    """Fewer neurons with fewer slots, fewer experts, or both: the price is what is read, and both cost less than each."""
    fewer = bench.points(asked)[-1].point
    slots, routing = FULL.with_budget(0.5, "product").slots, bench.points("uniform")[0].point.routing
    told = []
    for parts in ({"slots": slots}, {"routing": routing}, {"slots": slots, "routing": routing}):
        cost, (per_token, distinct) = read_by_hand(bench, replace(fewer, **parts))
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

"""Slots with widths of their own: the ranking against brute force, what runs against the reference, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.artefact.load import load
from moe_prism.elastic.base import Slots
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.coded import CodedLayer, block_bytes
from moe_prism.elastic.execute.plain import reference
from moe_prism.elastic.rules.bits import Bits, hull
from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier.cost import measured_cost
from moe_prism.point import FULL, OperatingPoint, SlotBits, SlotRule

ERRORS = (0.15, 0.04, 0.01, 0.0001)


def bits_of(layers: int, **changes) -> SlotBits:
    return replace(SlotBits(widths=(2.0, 3.0, 4.0, 8.0), errors=(ERRORS,) * layers, group=32, choosing=4.0), **changes)


@pytest.fixture(scope="module")
def model(elastic_tiny):
    return load(elastic_tiny)[0]


def test_the_ranking_is_the_least_loss_for_its_bytes(model):
    """Against every assignment of widths to four slots that costs no more."""
    layer = model._moe_prism.layers[0]
    rule = Bits(layer.parts, bits_of(2))
    generator = torch.Generator().manual_seed(0)
    sizes = {0.0: 0.0} | {w: block_bytes(layer.parts, w, 32) for w in rule.bits.widths}
    lost = {0.0: 1.0} | dict(zip(rule.bits.widths, ERRORS, strict=True))
    for position in (0.02, 0.1, 0.3, 0.6, 0.9):
        values = torch.rand(1, 1, 4, generator=generator) * float(rule.cutoffs[20])
        one = torch.ones(1, 1)
        slots = Slots(torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.long), one, one.bool(), 4, lambda v=values: v)
        chosen = rule.widths(slots, torch.tensor([position])).flatten().tolist()
        if sum(w > 0 for w in chosen) < 2:  # a token's best slot is kept whatever it is worth
            continue

        worth = values.flatten().square().tolist()
        room = sum(sizes[w] for w in chosen)
        every = [ws for ws in itertools.product(sizes, repeat=4) if sum(sizes[w] for w in ws) <= room]
        losses = [sum(lost[w] * x for w, x in zip(ws, worth, strict=True)) for ws in every]
        assert losses[every.index(tuple(chosen))] == pytest.approx(min(losses), rel=1e-6)


def test_widths_that_gain_less_than_the_next_are_never_taken(model):
    parts = model._moe_prism.layers[0].parts
    steps = hull(parts, bits_of(2, errors=((0.5, 0.49, 0.01, 0.0),) * 2))
    assert [bits for bits, _ in steps] == [2.0, 4.0, 8.0] or [bits for bits, _ in steps] == [4.0, 8.0]
    assert all(low < high for (_, low), (_, high) in itertools.pairwise(steps))


@torch.no_grad()
@given(seed=st.integers(0, 999), tokens=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_compiled_widths_are_those_of_the_tensor_form(model, seed, tokens):
    rule, g = Bits(model._moe_prism.layers[0].parts, bits_of(2)), torch.Generator().manual_seed(seed)
    values = torch.rand(tokens, 3, 4, generator=g) * float(rule.cutoffs[10])
    valid = torch.rand(tokens, 3, generator=g) < 0.8
    values[~valid] = -1
    values[0, 0, 1] = values[0, 0, 0]  # equal ones
    slots = Slots(torch.zeros(tokens, 4), torch.zeros(tokens, 3, dtype=torch.long), values[:, :, 0], valid, 4, lambda: values)
    slots.__dict__["_values"] = values
    budget = torch.rand(tokens, generator=g)
    fast = rule.widths(slots, budget)
    rule._known = None
    assert torch.equal(fast, rule.widths(slots, budget))


@torch.no_grad()
def test_every_slot_is_computed_at_its_own_width(model):
    layer = model._moe_prism.layers[0]
    coded, parts = CodedLayer(layer.parts, bits_of(2)), layer.parts
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, parts.layer.hidden, generator=generator)
    index = torch.stack([torch.randperm(parts.layer.num_experts, generator=generator)[:2] for _ in range(5)])
    weight = torch.rand(5, 2, generator=generator)
    widths = torch.tensor([0.0, 2.0, 3.0, 4.0, 8.0, 16.0])[torch.randint(0, 6, (5, 2, parts.n_sub), generator=generator)]
    found = coded.run(lambda layer, bits, *slots: reference(layer.at(bits), *slots), x, index, weight, widths)
    wanted = torch.zeros_like(x)
    for bits in (2.0, 3.0, 4.0, 8.0):
        wanted += reference(coded.at(bits), x, index, weight, widths == bits)
    wanted += reference(parts, x, index, weight, widths == 16.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    near = [float((coded.at(b).layer.up - parts.layer.up).square().sum()) for b in (2.0, 3.0, 4.0, 8.0)]
    assert all(low > 3 * high for low, high in itertools.pairwise(near))


def test_more_budget_reads_more_bytes_and_never_more_than_eight_bits(model):
    elastic = model._moe_prism
    ids = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(2))
    read = []
    for budget in (0.3, 0.4, 0.5, 0.9):
        point = OperatingPoint(slots=SlotRule(rule="bits", budget=budget, bits=bits_of(2)))
        step = Step(bind(elastic, [point]))
        with torch.no_grad(), elastic.at(step), elastic.count():
            model(input_ids=ids)
            read.append(measured_cost(elastic, step).active_expert_bytes)
    assert read == sorted(read)
    whole = sum(
        float(layer.prices(bind(elastic, [FULL]).groups[0]).bytes["blocks"].mean()) * layer.parts.n_sub
        for layer in elastic.layers
    )
    assert read[-1] < 0.8 * whole * elastic.k


def test_what_does_not_fit_is_refused(model):
    elastic = model._moe_prism
    good = SlotRule(rule="bits", budget=0.3, bits=bits_of(2))
    for wrong in (bits_of(3), bits_of(2, group=33), bits_of(2, widths=(2.0, 3.0, 4.0, 9.0))):
        with pytest.raises(UsageError):
            bind(elastic, [OperatingPoint(slots=replace(good, bits=wrong))])
    with pytest.raises(UsageError, match="cannot share a batch"):
        bind(elastic, [OperatingPoint(slots=good), OperatingPoint(slots=replace(good, bits=bits_of(2, group=64)))])
    for words, changes in (("do not rise", {"widths": (3.0, 2.0, 4.0, 8.0)}), ("not stored", {"choosing": 5.0})):
        with pytest.raises(UsageError, match=words):
            bits_of(2, **changes)
    with pytest.raises(UsageError, match="knows no bits"):
        SlotRule(rule="product", budget=0.3, bits=bits_of(2))
    with pytest.raises(UsageError, match="what each width loses"):
        SlotRule(rule="bits", budget=0.3)


def test_it_survives_json_and_a_damaged_file_does_not():
    point = OperatingPoint(slots=SlotRule(rule="bits", budget=0.3, bits=bits_of(2)))
    assert OperatingPoint.from_json(point.to_json()) == point
    for key, value in (("widths", "2"), ("errors", [[1]]), ("group", 1.5), ("choosing", None), ("more", 1)):
        data = point.to_json()
        data["slots"]["bits"][key] = value
        with pytest.raises((CorruptError, UsageError)):
            OperatingPoint.from_json(data)

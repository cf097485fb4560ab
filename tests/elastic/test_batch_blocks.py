"""Blocks chosen for a batch: against brute force, both forms against each other, and one row against the rule `threshold`."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts, Slots, base
from moe_prism.elastic.bind import depends_on_batch
from moe_prism.elastic.rules import batch_blocks, rules, threshold
from moe_prism.elastic.rules.batch_blocks import PRICE, RATES, RATIO
from moe_prism.elastic.rules.threshold import QUANTILES
from moe_prism.model import find_layers
from moe_prism.point import FULL
from tests.parity.families import build

PLAN = LayerParts(find_layers(build("olmoe"))[0], 4, 0, {"cutoffs": torch.linspace(0.9, 0.0, QUANTILES)})
EXPERTS = PLAN.layer.num_experts
RULE = rules.get("batch-blocks")(PLAN)


def batch(seed, tokens, k=3, n=4, experts=EXPERTS):
    """Slots of rows that choose k experts each, some of them none."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    valid = torch.rand(tokens, k, generator=g) < 0.9
    valid[:, 0] = True
    norms = (torch.rand(tokens, k, n, generator=g) * 8).round() / 4  # with ties
    weight = torch.rand(tokens, k, generator=g)
    return Slots(torch.zeros(tokens, 2), index.masked_fill(~valid, -1), weight, valid, n, lambda: norms)


@contextmanager
def plain():
    """The tensor forms in place of the compiled ones."""
    modules = (base, batch_blocks, threshold)
    before = [m.is_compiled for m in modules]
    try:
        for m in modules:
            m.is_compiled = lambda *_: False
        yield
    finally:
        for m, function in zip(modules, before, strict=True):
            m.is_compiled = function


def blocks_of(slots, keep):
    number = slots.index.clamp(min=0)[:, :, None] * slots.n_sub + torch.arange(slots.n_sub)
    return set(number[keep].tolist())


def cost(slots, keep):
    return PRICE * int(keep.sum()) + (1 - PRICE) * len(blocks_of(slots, keep))


def best_of(slots):
    flat = slots.values().flatten(1)
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.argmax(1, keepdim=True), True).view_as(slots.values())


@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 12), k=st.integers(1, 4), n=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_compiled_form_equals_the_tensor_form(seed, tokens, k, n):
    budget = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).clamp(min=0.01)
    budget[0] = 1.0
    compiled = RULE.keep(batch(seed, tokens, k, n), budget)
    with plain():
        assert torch.equal(RULE.keep(batch(seed, tokens, k, n), budget), compiled)


@given(seed=st.integers(0, 10_000), budget=st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_one_row_keeps_what_threshold_keeps(seed, budget):
    budgets = torch.tensor([budget])
    alone = rules.get("threshold")(PLAN).keep(batch(seed, 1), budgets)
    assert torch.equal(RULE.keep(batch(seed, 1), budgets), alone)


@given(seed=st.integers(0, 10_000), tokens=st.integers(2, 24), budget=st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_a_batch_costs_no_more_and_every_row_keeps_its_best(seed, tokens, budget):
    """No more than if every row had chosen alone; nothing worthless is kept, and budget 1 beside it keeps all."""
    slots, budgets = batch(seed, tokens), torch.full((tokens,), budget)
    keep, alone = RULE.keep(slots, budgets), rules.get("threshold")(PLAN).keep(slots, budgets)
    assert cost(slots, keep) <= cost(slots, alone) + 1e-9
    assert (keep | ~best_of(slots)).all() and not keep[~slots.valid].any()
    budgets[0] = 1.0
    assert torch.equal(RULE.keep(slots, budgets)[0], slots.valid[0, :, None].expand(-1, 4))


@pytest.mark.parametrize("seed", range(25))
def test_nothing_is_better_at_the_rate_it_finds(seed):
    """Of all sets of slots that hold every row's best: least loss + rate x cost; and the rate before it costs too much."""
    slots, budgets = batch(seed, 3, k=2, n=2, experts=3), torch.full((3,), 0.3 + 0.5 * (seed % 5) / 5)
    keep = RULE.keep(slots, budgets)
    cutoff = RULE.level(budgets)[:, None, None]
    worth = (slots.values().double() / cutoff.double()).square()
    own = ((slots.values() >= cutoff) | best_of(slots)) & slots.valid[:, :, None]
    limit = cost(slots, own)
    rates = [RATIO**i for i in range(RATES)]
    every = list(all_keeps(slots))
    losses = torch.stack([(worth * ~one)[slots.valid].sum() for one in every])
    costs = torch.tensor([cost(slots, one) for one in every], dtype=torch.float64)

    def least(rate):
        return float((losses + rate * costs).min())

    def total(one, rate):
        return float((worth * ~one)[slots.valid].sum()) + rate * cost(slots, one)

    fits = [rate for rate in rates if total(keep, rate) <= least(rate) + 1e-9]
    assert fits, "at no rate is it the best"
    assert cost(slots, keep) <= limit + 1e-9
    before = rates[rates.index(fits[0]) - 1]
    if fits[0] > 1:  # what is best at a lower rate costs too much
        at_least = losses + before * costs
        assert costs[at_least <= at_least.min() + 1e-9].min() > limit - 1e-9


def all_keeps(slots):
    """Every set of slots that holds all rows' best ones."""
    open_ = (slots.valid[:, :, None] & ~best_of(slots)).nonzero().tolist()
    for marks in itertools.product((False, True), repeat=len(open_)):
        keep = best_of(slots).clone()
        for (t, c, n), mark in zip(open_, marks, strict=True):
            keep[t, c, n] = mark
        yield keep


def test_a_point_says_that_it_depends_on_its_batch():
    assert depends_on_batch(FULL.with_budget(0.5, "batch-blocks"))
    assert not depends_on_batch(FULL.with_budget(0.5))

"""Rows that choose their blocks together, from the store: the same results, and what is counted is what is read."""

import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.elastic.bind import Step, bind
from moe_prism.point import FULL
from tests.store.common import opened, store_of

ROWS = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:6, None]  # a decode step of six requests


@torch.no_grad()
def step_of(model, rule, budget):
    """(logits of a step, blocks of it that are counted once for all rows, slots kept)."""
    elastic = model._moe_prism
    with elastic.at(Step(bind(elastic, [FULL.with_slots(budget, rule)]))), elastic.count():
        found = model(input_ids=ROWS, use_cache=False).logits
    counters = [layer.counter for layer in elastic.layers]
    return found, sum(int(c.per_batch["blocks"].sum()) for c in counters), sum(c.kept for c in counters)


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_the_blocks_that_are_counted_are_read_and_no_others(elastic_tiny, tmp_path, budget):
    model, _ = load(elastic_tiny)
    found = {}
    for rule in ("threshold", "batch-blocks"):
        stored, _ = opened(elastic_tiny, tmp_path / "p")  # everything would fit, and nothing is there
        store = store_of(stored)
        logits, blocks, slots = found[rule] = step_of(stored, rule, budget)
        assert store.times.bytes == blocks * store.pack.layout.bytes
        wanted, counted, kept = step_of(model, rule, budget)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert (blocks, slots) == (counted, kept)
    assert found["batch-blocks"][1] < found["threshold"][1]  # here: not more blocks, and more of them used
    assert found["batch-blocks"][2] > found["threshold"][2]

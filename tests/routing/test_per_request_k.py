"""Every request with its own number of experts, fewer or more than the router's, in one batch: what operating points already give."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_prism
from moe_prism.elastic.bind import Step, bind
from moe_prism.point import FULL, OperatingPoint, RoutingStage

COUNTS = (1, 2, 3, 4)  # of the model's four experts, of which its router takes two
OWN = 2


def point(k: int, layers: int = 2) -> OperatingPoint:
    """Exactly k experts per token: up to the router's k its best ones, beyond it the best of all."""
    if k == OWN:
        return FULL
    if k < OWN:
        return OperatingPoint(routing=(RoutingStage(layers=(k,) * layers, stage="top-n"),))
    everything = ((2.0,),) * layers  # no share of the probability is as large, so the count alone ends it
    return OperatingPoint(routing=(RoutingStage(layers=(k,) * layers, stage="top-p", parameters={"p": everything}),))


@pytest.fixture
def model(elastic_tiny, monkeypatch):
    monkeypatch.setenv("MOE_PRISM_WHOLE", "tiles")  # who computes the full budget: the model's own function would round otherwise
    return moe_prism.load(elastic_tiny)[0]


@torch.no_grad()
def run(model, ids, counts):
    """Logits of a batch whose rows have these counts."""
    bound = bind(model._moe_prism, [point(k) for k in COUNTS])
    which = torch.tensor([COUNTS.index(k) for k in counts]).repeat_interleave(ids.shape[1])
    with model._moe_prism.at(Step(bound, which)):
        return model(ids).logits


def test_every_row_is_the_unmodified_model_with_that_many_experts(model, tiny_source):
    ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(3))
    mixed = run(model, ids, COUNTS)
    for row, k in enumerate(COUNTS):
        config = AutoConfig.from_pretrained(tiny_source)
        config.num_experts_per_tok = k
        stock = AutoModelForCausalLM.from_pretrained(tiny_source, config=config, dtype=torch.float32).eval()
        with torch.no_grad():
            want = stock(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_rows_of_the_models_own_count_are_the_same_bits_whatever_their_neighbours_have(model):
    ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        plain = model(ids).logits
    for counts in ((2, 1, 2, 4), (2, 3, 2, 1), (2, 2, 2, 4)):
        mixed = run(model, ids, counts)
        own = [row for row, k in enumerate(counts) if k == OWN]
        assert torch.equal(mixed[own], plain[own])
        others = [row for row, k in enumerate(counts) if k != OWN]
        assert all(not torch.equal(mixed[row], plain[row]) for row in others)

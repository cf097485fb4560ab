"""The graph of tokens: experts by the scores of like tokens before, however a text is cut into forwards."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moe_prism
from moe_prism.elastic.observe import viewed
from moe_prism.errors import UsageError
from moe_prism.methods.skip import graph
from moe_prism.methods.skip.attention_graph import AttentionGraph
from moe_prism.methods.skip.graph import WINDOW, TokenGraph, mix, neighbours
from moe_prism.point import FULL, OperatingPoint, RoutingStage
from moe_prism.schedule.base import Ladder, Level
from tests.tiers import by_night

SHARE = 0.8


KINDS = ("graph", "attention-graph")


def point(share=SHARE, layers=2, kind="graph"):
    stage = RoutingStage(layers=(2,) * layers, stage=kind, parameters={"a": ((share,),) * layers}, keep_mass=False)
    return OperatingPoint(routing=(stage,))


@pytest.fixture(scope="module")
def model(elastic_tiny):
    return moe_prism.load(elastic_tiny)[0]


def text(rows, length, seed=0):
    return torch.randint(5, 400, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_rows_are_those_of_a_loop_over_tokens_and_stay_distributions(model):
    """The first layer, whose input does not depend on the stage: every token against itself and at most WINDOW before it."""
    ids, elastic, seen = text(2, 3 * WINDOW), model._moe_prism, []

    def look(routed):
        if routed.layer == 0:
            scores = routed.scores()
            seen.append((routed.x, scores, mix(scores, torch.tensor([[SHARE]]), *neighbours(routed, scores))))
        return routed.weight

    with elastic.at([point()]), viewed(elastic, look):
        model(ids)
    ((x, scores, mixed),) = seen
    length = ids.shape[1]
    for t in range(len(x)):
        first = max(t // length * length, t - WINDOW)
        like = torch.stack([x[t] @ x[j] for j in range(first, t + 1)]) / x.shape[1] ** 0.5
        want = (1 - SHARE) * scores[t] + SHARE * (like.softmax(0)[:, None] * scores[first : t + 1]).sum(0)
        torch.testing.assert_close(mixed[t], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(x)))
    assert not torch.equal(mixed.topk(2, 1).indices, scores.topk(2, 1).indices)


@torch.no_grad()
def test_attention_shares_are_the_models_own_attention_on_a_window(model):
    """Of the layer before, from transformers' eager attention: rows cut to the window, made to sum to 1, mean over heads."""
    ids, elastic, seen = text(2, 3 * WINDOW), model._moe_prism, []

    def look(routed):
        if routed.layer == 0:
            seen.append((routed.scores(), *AttentionGraph.near(routed, routed.scores())))
        return routed.weight

    with elastic.at([point(kind="attention-graph")]), viewed(elastic, look):
        model(ids)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        whole = model(ids, output_attentions=True).attentions[0]  # [rows, heads, T, T]
    finally:
        model.set_attn_implementation(before)
    ((scores, near, theirs),) = seen
    length = ids.shape[1]
    for t in range(2 * length):
        row, at = divmod(t, length)
        first = max(0, at - WINDOW)
        own = whole[row, :, at, first : at + 1]
        want = (own / own.sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close((near[t, :, None] * theirs[t]).sum(0), want @ scores[row * length + first : t + 1])
    torch.testing.assert_close(near.sum(1), torch.ones(2 * length))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1,), (7, 30), (64, 3)])
def test_a_text_in_pieces_is_the_text_at_once(model, cuts, kind):
    """Beyond the first places of a cache, so that it grows while rows are known."""
    ids = text(3, 100, seed=1)
    with model._moe_prism.at([point(kind=kind)]):
        whole = model(ids).logits
        kept, parts, begin, turn = None, [], 0, 0
        while begin < ids.shape[1]:
            size = cuts[turn % len(cuts)]
            out = model(ids[:, begin : begin + size], past_key_values=kept, use_cache=True)
            kept, begin, turn = out.past_key_values, begin + size, turn + 1
            parts.append(out.logits)
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    assert not torch.equal(whole, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_reordered_take_their_tokens_along(model, kind):
    """As a beam search does."""
    ids, after = text(2, 20, seed=2), text(2, 4, seed=3)
    with model._moe_prism.at([point(kind=kind)]):
        out = model(ids, use_cache=True)
        out.past_key_values.reorder_cache(torch.tensor([1, 1]))
        found = model(after, past_key_values=out.past_key_values, use_cache=True).logits
        want = model(torch.cat([ids[[1, 1]], after], 1)).logits[:, 20:]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_tokens_at_another_point_are_not_looked_at(model):
    """What ran without the stage left no scores: the graph begins anew behind it."""
    ids = text(1, 24, seed=4)
    elastic = model._moe_prism
    with elastic.at([point(), FULL]) as step:
        step.which = 1
        kept = model(ids[:, :12], use_cache=True).past_key_values
        step.which = 0
        first = model(ids[:, 12:13], past_key_values=kept, use_cache=True).logits
    plain = model(ids[:, :13]).logits[:, 12:]
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_nothing_before_it(model, kind):
    ids = text(1, 40, seed=5)
    other = ids.clone()
    other[0, 30:] = (other[0, 30:] + 7) % 400
    with model._moe_prism.at([point(kind=kind)]):
        one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :30], two[:, :30]) and not torch.equal(one[:, 30:], two[:, 30:])


@pytest.mark.parametrize("kind", by_night(KINDS, KINDS[0]))
def test_the_server_gives_the_tokens_of_the_text_at_once_beside_others(model, elastic_tiny, kind):
    pytest.importorskip("fastapi")
    from tests.serve.test_engine import Waves

    served = moe_prism.load(elastic_tiny)[0]
    prompts = [text(1, n, seed=n)[0].tolist() for n in (40, 9, 25)]
    ladder = Ladder((Level("graph", point(kind=kind), 7, 0.9), Level("full", FULL, 8, 1.0)))
    waves = Waves(served, ladder, step_tokens=16)
    try:
        found = [tokens for tokens, _, _ in waves.run(prompts, [0, 0, 1], new=6)]
        again = [tokens for tokens, _, _ in waves.run(prompts[:1], [0], new=6)]  # its prefix is found in the cache
    finally:
        waves.engine.stop()
    for prompt, at, tokens in zip(prompts, (point(kind=kind), point(kind=kind), FULL), found, strict=True):
        with model._moe_prism.at([at]), torch.no_grad():
            made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == made[0, len(prompt) :].tolist()
    assert again == found[:1]


@torch.no_grad()
def test_attention_that_cannot_be_heard_is_refused_and_the_one_in_use_comes_back(model):
    before = model.config._attn_implementation
    own = ALL_ATTENTION_FUNCTIONS[before]
    with model._moe_prism.at([point(kind="attention-graph")]):
        assert ALL_ATTENTION_FUNCTIONS[before] is not own
    assert ALL_ATTENTION_FUNCTIONS[before] is own
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(UsageError, match="cannot be watched"), model._moe_prism.at([point(kind="attention-graph")]):
            pass
    finally:
        model.set_attn_implementation(before)


def test_a_share_of_nothing_is_the_model_and_a_wrong_one_is_refused(model):
    stage = TokenGraph([RoutingStage(layers=(2, 2), stage="graph", parameters={"a": ((0.0,), (0.0,))})])
    assert stage.is_neutral(0, 0, 2)
    made = graph.Graph("graph:2", graph.GraphParameters(a=2.0))
    with pytest.raises(UsageError, match="no share between 0 and 1"):
        made.fit(None, None)

"""Dense layers dealt to experts: every neuron once, and the sum of the parts is the layer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.compress.split import Deal, shared_neurons
from moe_prism.compress.split.router import SPREAD, error, fit_router, outputs, scaled
from moe_prism.compress.split.target import check_family, target_config
from moe_prism.errors import UsageError
from moe_prism.methods.split import splits
from moe_prism.methods.split.base import DenseSeen, by_strength, snake
from moe_prism.methods.split.read_me import ReadMe
from moe_prism.model import find_layers
from tests.parity.families import build

F, E, S = 40, 4, 8


@pytest.fixture
def seen() -> DenseSeen:
    draw = torch.Generator().manual_seed(0)
    domains = {name: torch.rand(F, generator=draw) ** 2 for name in ("code", "prose")}
    return DenseSeen(neurons=F, experts=E, shared=S, importance=sum(domains.values()), domains=domains)


@pytest.mark.parametrize("name", splits.names())
def test_every_neuron_has_one_place(name, seen):
    deal = splits.get(name)().deal(seen)
    deal.check(F)
    assert len(deal.shared) == S and [len(own) for own in deal.experts] == [(F - S) // E] * E


def test_a_deal_with_a_neuron_twice_is_none():
    with pytest.raises(ValueError, match="each of 4 neurons once"):
        Deal(torch.tensor([0]), (torch.tensor([1]), torch.tensor([1]))).check(4)


def test_the_strongest_always_run_and_the_rest_is_dealt_like_a_snake(seen):
    deal = splits.get("importance")().deal(seen)
    order = sorted(range(F), key=lambda n: -float(seen.importance[n]))
    assert deal.shared.tolist() == order[:S]
    rest, hands = order[S:], [[] for _ in range(E)]
    for row in range(len(rest) // E):
        cards = rest[row * E : (row + 1) * E]
        for hand, card in zip(hands, cards if row % 2 == 0 else cards[::-1], strict=True):
            hand.append(card)
    assert [own.tolist() for own in deal.experts] == hands
    assert snake(torch.arange(4), 2)[0].tolist() == [0, 3]


def test_masks_are_the_strongest_neurons_of_a_domain(seen):
    masks, facts = ReadMe.masks(seen), ReadMe().facts(seen)
    expected = [set(by_strength(values)[: F // 2].tolist()) for values in seen.domains.values()]
    assert [set(torch.where(mask)[0].tolist()) for mask in masks] == expected
    both, either = expected[0] & expected[1], expected[0] | expected[1]
    assert facts["jaccard_mean"] == facts["jaccard_most"] == pytest.approx(len(both) / len(either))
    assert facts["in_all_masks"] == len(both) and facts["in_no_mask"] == F - len(either)


def test_what_is_in_all_masks_always_runs_and_the_others_go_where_they_are_strong(seen):
    deal = ReadMe().deal(seen)
    inside = ReadMe.masks(seen).sum(0)
    assert int(inside[deal.shared].min()) >= int(max(inside[own].max() for own in deal.experts)) - 1
    assert set(torch.where(inside == 2)[0].tolist()) <= set(deal.shared.tolist()) or int(inside[deal.shared].min()) == 2
    shares = torch.stack([values / values.sum() for values in seen.domains.values()])
    prefer = (shares[0] - shares[1]) / shares.sum(0)
    homes = [torch.cat(deal.experts[:2]), torch.cat(deal.experts[2:])]
    assert float(prefer[homes[0]].mean()) > 0 > float(prefer[homes[1]].mean())


def test_domains_that_do_not_divide_the_experts_are_refused(seen):
    three = {**seen.domains, "web": torch.ones(F)}
    with pytest.raises(UsageError, match="4 experts cannot be divided among 3 domains"):
        ReadMe().deal(DenseSeen(neurons=F, experts=E, shared=S, importance=seen.importance, domains=three))


@pytest.mark.parametrize(("neurons", "experts", "share"), [(1536, 16, 0.25), (1536, 16, 0.0), (1000, 7, 0.3), (100, 8, 0.0)])
def test_what_is_not_shared_divides_into_experts_that_matrix_products_like(neurons, experts, share):
    legal = [n for n in range(neurons) if (neurons - n) % (8 * experts) == 0]
    assert abs(shared_neurons(neurons, experts, share) - share * neurons) == min(abs(n - share * neurons) for n in legal)


def test_too_many_experts_are_refused():
    with pytest.raises(UsageError, match="100 neurons make no 16 experts of 8 or more"):
        shared_neurons(100, 16, 0.25)


@pytest.fixture
def layer():
    return find_layers(build("llama"), dense=True)[0]


@torch.no_grad()
def test_the_parts_add_up_to_the_layer(layer):
    order = torch.randperm(layer.width, generator=torch.Generator().manual_seed(1))
    deal = Deal(order[:4], tuple(order[4:].chunk(4)))
    x = torch.randn(9, layer.hidden)
    whole, added = layer.project(0, layer.activations(0, x)), outputs(layer, deal, x)
    a = layer.activations(0, x)[:, deal.shared]
    assert torch.allclose(added.sum(1) + a @ layer.down[0][:, deal.shared].T, whole, rtol=1e-5, atol=1e-6)
    for e, own in enumerate(deal.experts):  # by loops
        for t in range(9):
            row = layer.activations(0, x[t : t + 1])[0]
            assert torch.allclose(added[t, e], sum(row[n] * layer.down[0, :, n] for n in own.tolist()), rtol=1e-4, atol=1e-6)


def test_a_router_predicts_norms_and_its_scores_are_all_but_equal():
    draw = torch.Generator().manual_seed(2)
    x, true = torch.randn(400, 6, generator=draw), torch.randn(3, 6, generator=draw)
    norms = (x @ true.T) - (x @ true.T).min() + 1
    added = torch.nn.functional.normalize(torch.randn(400, 3, 5, generator=draw), dim=-1) * norms[..., None]
    router = fit_router(x, added)
    scores = x @ router.T
    assert float((scores - scores.mean(1, keepdim=True)).abs().max()) == pytest.approx(SPREAD, rel=1e-3)
    assert float((scores.argmax(1) == norms.argmax(1)).double().mean()) > 0.9
    assert torch.equal((x @ scaled(100 * true, x).T).argsort(1), (x @ true.T).argsort(1))


def test_an_error_is_what_is_left_out():
    draw = torch.Generator().manual_seed(3)
    added, scores = torch.randn(5, 4, 3, generator=draw), torch.randn(5, 4, generator=draw)
    whole = torch.randn(5, 3, generator=draw)
    missing = 0.0
    for t in range(5):
        kept = set(sorted(range(4), key=lambda e: -float(scores[t, e]))[:2])
        gone = sum(added[t, e] for e in range(4) if e not in kept)
        missing += float((gone**2).sum())
    assert error(added, scores, 2, whole) == pytest.approx(missing / float((whole**2).sum()), rel=1e-5)
    assert error(added, scores, 4, whole) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_families_of_llamas_kind_are_taken(family):
    config = AutoConfig.for_model(family, **SMALL)
    if family == "mistral":
        config.sliding_window = None
    check_family(config)


SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("family", ["gemma", "qwen3", "olmo2"])
def test_a_family_that_computes_otherwise_is_refused(family):
    with pytest.raises(UsageError, match="Llama"):
        check_family(AutoConfig.for_model(family, **SMALL, head_dim=8))


def test_a_sliding_window_is_refused_by_its_number():
    config = AutoConfig.for_model("mistral", **SMALL, sliding_window=16)
    with pytest.raises(UsageError, match="attends to 16 tokens only"):
        target_config(config, experts=2, active=2, shared=4, bias=False)


def test_the_configuration_carries_what_both_families_know():
    config = AutoConfig.for_model("llama", **SMALL, rms_norm_eps=3e-5, tie_word_embeddings=True)
    made = target_config(config, experts=4, active=2, shared=4, bias=False)
    assert (made.model_type, made.rms_norm_eps, made.tie_word_embeddings) == ("qwen2_moe", 3e-5, True)
    assert (made.num_experts, made.num_experts_per_tok, made.moe_intermediate_size, made.shared_expert_intermediate_size) == (
        4,
        2,
        4,
        4,
    )
    assert not made.norm_topk_prob and not made.qkv_bias
    assert AutoModelForCausalLM.from_config(made).config.model_type == "qwen2_moe"

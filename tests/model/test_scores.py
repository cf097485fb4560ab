"""The router's probabilities against what the family's own router computed, and the proof of which activation it is."""

from __future__ import annotations

import pytest
import torch

from moe_prism.errors import UsageError
from moe_prism.model import MoELayer, RouterScores, find_layers
from moe_prism.model.router import Router
from moe_prism.model.scores import ACTIVATIONS, router_weight

from ..parity.checks import output
from ..parity.families import build

FAMILIES = {
    "olmoe": "softmax",  # not normalised
    "mixtral": "softmax",  # normalised
    "qwen2_moe": "softmax",  # beside a shared expert
    "dbrx": "softmax",
    "jetmoe": "softmax",  # of the chosen logits only
    "gpt_oss": "softmax",  # with a bias
    "longcat_flash": "softmax",  # with extra experts, a selection bias, a factor
    "deepseek_v3": "sigmoid",  # with a selection bias, normalised, a factor
    "minimax_m2": "sigmoid",
    "step3p7": "sigmoid",
}


def routed(family: str) -> list[tuple[MoELayer, RouterScores, tuple[torch.Tensor, ...], torch.Tensor | None]]:
    """Of every layer: its scores, what it was called with, and the logits its own router computed."""
    model = build(family)
    layers, rows = find_layers(model), []

    def observe(layer: MoELayer, last):
        def experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            rows.append((layer, RouterScores(model, layer), (x, index, weight), last()))
            return layer.stock(x, index, weight)

        return experts

    for layer in layers:
        router = Router(model, layer)
        router.experts += len(layer.extra or ())
        watch = router.watched()
        layer.install(observe(layer, watch.__enter__()))
        layer._watch = watch  # the hooks live as long as the layer
    output(model)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_own_router_says_the_same(family: str) -> None:
    rows = routed(family)
    assert rows
    for layer, scores, call, logits in rows:
        found = scores(*call)
        assert scores.activation == FAMILIES[family]
        assert logits is not None and found.dtype == torch.float32
        assert found.shape == (len(call[0]), layer.num_experts + len(layer.extra or ()))
        expected = logits if _is_probability(logits) else ACTIVATIONS[FAMILIES[family]](logits.float())
        torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-6)


def _is_probability(values: torch.Tensor) -> bool:
    """Some routers give only probabilities away."""
    return bool(((values >= 0) & (values <= 1)).all())


@pytest.mark.parametrize("family", ["phimoe", "deepseek_v4"])
def test_other_scores_are_refused(family: str) -> None:
    model = build(family)
    layer = find_layers(model)[-1]
    scores, problems = RouterScores(model, layer), []

    def experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UsageError, match=rf"cannot be told at '{layer.name}'.*choose a routing stage") as caught:
            scores(x, index, weight)
        problems.append(caught.value)
        return layer.stock(x, index, weight)

    layer.install(experts)
    output(model)
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama4", "inputs that their router did not see"),
        ("zaya", "no router matrix was found beside"),  # several layers
        ("inkling", "no router matrix was found beside"),  # rows for its shared experts too
    ],
)
def test_layers_without_a_router_on_their_input_are_refused(family: str, words: str) -> None:
    model = build(family)
    with pytest.raises(UsageError, match=words):
        RouterScores(model, find_layers(model)[0])


def made(activation: str, k: int = 2, tokens: int = 6, family: str = "olmoe"):
    """A layer's scores and a batch routed by softmax or sigmoid of its router's logits."""
    model = build(family)
    layer = find_layers(model)[0]
    x = torch.randn(tokens, layer.hidden, generator=torch.Generator().manual_seed(7))
    p = ACTIVATIONS[activation](x @ router_weight(model, layer).T)
    weight, index = p.topk(k, -1)
    return model, RouterScores(model, layer), x, index, weight, p


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("change", ["as they are", "normalised", "scaled", "one skipped", "an unknown id"])
def test_the_proof(activation: str, change: str) -> None:
    _, scores, x, index, weight, p = made(activation, k=3)
    if change == "normalised":
        weight = weight / weight.sum(1, keepdim=True)
    elif change == "scaled":
        weight = 2.5 * weight
    elif change == "one skipped":
        index[:, 1], weight[:, 1] = -1, 0
    elif change == "an unknown id":
        index[:, 2] = 50
    torch.testing.assert_close(scores(x, index, weight), p)
    assert scores.activation == activation


def test_the_verdict_is_remembered() -> None:
    _, scores, x, index, weight, p = made("sigmoid")
    scores(x, index, weight)
    torch.testing.assert_close(scores(x, index, torch.rand(index.shape)), p)  # such weights would be refused at first use


def test_one_choice_proves_nothing() -> None:
    model, scores, x, index, weight, _ = made("sigmoid", k=1)
    softmax = (x @ router_weight(model, scores.layer).T).softmax(-1)
    torch.testing.assert_close(scores(x, index, weight), softmax)
    assert scores.activation is None
    model.config.scoring_func = "sigmoid"
    torch.testing.assert_close(RouterScores(model, scores.layer)(x, index, weight), _sigmoid(model, scores, x))
    model.config.scoring_func = "sqrtsoftplus"
    with pytest.raises(UsageError, match="cannot be told"):
        RouterScores(model, scores.layer)(x, index, weight)


def _sigmoid(model: torch.nn.Module, scores: RouterScores, x: torch.Tensor) -> torch.Tensor:
    return (x @ router_weight(model, scores.layer).T).sigmoid()


def test_a_batch_on_which_both_agree_decides_nothing() -> None:
    _, scores, x, index, weight, _ = made("softmax")
    scores(x, index.fill_(3), weight.fill_(0.5))  # one expert twice: the ratio is constant for any function
    assert scores.activation is None


def test_half_precision_is_told_apart_too() -> None:
    model, _, x, index, _, _ = made("sigmoid", tokens=64)
    model.bfloat16()
    layer = find_layers(model)[0]
    logits = x.bfloat16() @ router_weight(model, layer).T
    for activation, function in ACTIVATIONS.items():
        weight, index = function(logits.float()).topk(2, -1)
        scores = RouterScores(model, layer)
        scores(x.bfloat16(), index, weight.bfloat16())
        assert scores.activation == activation


def test_a_dense_layer_has_one_expert_of_probability_one() -> None:
    from .test_dense import build as dense

    model = dense("llama")
    layer = find_layers(model)[0]
    x = torch.randn(3, layer.hidden)
    found = RouterScores(model, layer)(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert torch.equal(found, torch.ones(3, 1))

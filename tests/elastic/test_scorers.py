"""Scorers: the gate scores against their formula, the ridge fit against scikit-free least squares, the oracle against the truth."""

import pytest
import torch

from moe_prism.elastic import LayerParts
from moe_prism.elastic.scorers import low_rank as low_rank_module
from moe_prism.elastic.scorers import ridge as ridge_module
from moe_prism.elastic.scorers import ridge_fit as ridge_fit_module
from moe_prism.elastic.scorers import scorers
from moe_prism.errors import UsageError
from moe_prism.model import find_layers
from tests.parity.families import build


@pytest.fixture(scope="module")
def layer():
    return find_layers(build("olmoe"))[0]


def inputs(layer, n=400):
    return torch.randn(n, layer.hidden, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_gate_scores_follow_the_paper(layer):
    plan = LayerParts(layer, 4, 2)
    x = inputs(layer, 5)
    score = scorers.get("gates")(plan)(x, torch.zeros(5, 1, dtype=torch.long))
    gate, up = layer.gate[0], layer.up[0]
    for n in range(4):
        rows = slice(n * plan.block, n * plan.block + 2)
        a = torch.nn.functional.silu(x @ gate[rows].T) * (x @ up[rows].T)
        torch.testing.assert_close(score[:, 0, n], a.abs().mean(1))


@torch.no_grad()
def test_oracle_is_the_true_norm(layer):
    plan = LayerParts(layer, 4, 0)
    x = inputs(layer, 3)
    norms = scorers.get("oracle")(plan)(x, torch.tensor([[1, 2]] * 3))
    a = layer.activations(2, x)
    expected = (a[:, plan.neurons(3)] @ layer.down[2][:, plan.neurons(3)].T).norm(dim=1)
    torch.testing.assert_close(norms[:, 1, 3], expected)


@torch.no_grad()
def test_ridge_recovers_a_linear_truth(monkeypatch, layer):
    plan = LayerParts(layer, 4, 0)
    truth = torch.rand(layer.hidden, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr(ridge_module, "FLOOR", 0.0)
    monkeypatch.setattr(ridge_module, "block_norms", lambda plan, x, expert: (x.double() @ truth + 3.0).exp())
    weight = ridge_module.fit(plan, [inputs(layer)] * layer.num_experts).weight
    torch.testing.assert_close(weight[0, :, :-1].double().T, truth, atol=0.02, rtol=0.02)  # the log of the norm; kept in bfloat16
    torch.testing.assert_close(weight[0, :, -1].double(), torch.full((4,), 3.0, dtype=torch.float64), atol=0.05, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("gates", [0, 2])
def test_low_rank_recovers_a_shared_truth(monkeypatch, layer, gates):
    """Log norms that depend on x through 3 directions common to all experts, linearly and through their absolute values."""
    plan = LayerParts(layer, 4, gates)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(layer.hidden, 3, generator=generator, dtype=torch.float64) / layer.hidden**0.5
    heads = torch.randn(layer.num_experts, 6, 4, generator=generator, dtype=torch.float64)

    def truth(plan, x, expert):
        h = x.double() @ directions
        return (torch.cat([h, h.abs()], 1) @ heads[expert] + 1.0).exp()

    monkeypatch.setattr(ridge_module, "FLOOR", 0.0)
    monkeypatch.setattr(ridge_module, "block_norms", truth)
    monkeypatch.setattr(low_rank_module, "RANK", 3)
    samples = [inputs(layer, 600) * (1 + 0.1 * e) for e in range(layer.num_experts)]
    plan.tensors |= scorers.get("low-rank").fit(plan, samples)
    assert plan.tensors["low_rank.map"].shape == (3, layer.hidden + 1)
    scorer = scorers.get("low-rank")(plan)
    x, index = torch.randn(50, layer.hidden, generator=generator), torch.tensor([[2, 0]] * 50)
    expected = torch.stack([truth(plan, x, 2), truth(plan, x, 0)], 1).log()
    error = (scorer(x, index).double().log() - expected).square().mean()
    # the directions are mixed by V, so |V x| is not |x directions|: the linear part is exact, of the rest most is explained
    assert error < 0.2 * expected.var()
    assert scorer.parameters_per_expert() == 4 * (6 + 4 * gates + 1) and scorer.parameters_per_token() == 3 * (layer.hidden + 1)


@torch.no_grad()
def test_low_rank_with_every_direction_is_no_worse_than_ridge(layer, monkeypatch):
    monkeypatch.setattr(low_rank_module, "RANK", layer.hidden)
    plan = LayerParts(layer, 4, 0)
    samples = [inputs(layer)] * layer.num_experts
    plan.tensors |= {"ridge": ridge_module.fit(plan, samples).weight, **scorers.get("low-rank").fit(plan, samples)}
    index = torch.zeros(400, 1, dtype=torch.long)
    true = scorers.get("oracle")(plan)(samples[0], index).log()
    low, full = ((scorers.get(name)(plan)(samples[0], index).log() - true).square().mean() for name in ("low-rank", "ridge"))
    assert low <= 1.02 * full


def test_low_rank_that_was_not_fitted_says_how_to(layer):
    with pytest.raises(UsageError, match="without the low-rank predictor"):
        scorers.get("low-rank")(LayerParts(layer, 4, 0))


def test_gate_scores_without_gate_neurons_are_refused(layer):
    with pytest.raises(UsageError, match="refactor with --gates 4"):
        scorers.get("gates")(LayerParts(layer, 4, 0))


@torch.no_grad()
def test_every_layer_uses_its_own_predictor():
    """A shared closure once gave every layer the last layer's gates, with plausible numbers."""
    layers = find_layers(build("olmoe"))
    weights = []
    for layer in layers[:2]:
        plan = LayerParts(layer, 4, 1)
        plan.tensors["ridge"] = ridge_module.fit(plan, [inputs(layer)] * layer.num_experts).weight
        weights.append(plan.tensors["ridge"])
        x = inputs(layer, 200)
        index = torch.zeros(200, 1, dtype=torch.long)
        predicted, true = scorers.get("ridge")(plan)(x, index), scorers.get("oracle")(plan)(x, index)
        assert torch.corrcoef(torch.stack([predicted.flatten(), true.flatten()]))[0, 1] > 0.5
    assert not torch.equal(weights[0], weights[1])


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 15, 40])
def test_few_tokens_give_finite_predictions(layer, rows):
    plan = LayerParts(layer, 4, 1)
    plan.tensors["ridge"] = ridge_module.fit(plan, [inputs(layer, rows)] * layer.num_experts).weight
    plan.tensors |= scorers.get("low-rank").fit(
        plan, [inputs(layer, max(1, rows))] + [inputs(layer, rows)] * (layer.num_experts - 1)
    )
    for name in ("ridge", "low-rank"):
        assert torch.isfinite(scorers.get(name)(plan)(inputs(layer, 7), torch.ones(7, 1, dtype=torch.long))).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_a_few_choices_give_what_many_give(family):
    layer = find_layers(build(family))[0]
    plan = LayerParts(layer, 4, 2)
    plan.tensors["ridge"] = ridge_module.fit(plan, [inputs(layer)] * layer.num_experts).weight
    scorer = scorers.get("ridge")(plan)
    x = inputs(layer, 80)
    index = torch.stack([torch.arange(80) % layer.num_experts, (torch.arange(80) + 1) % layer.num_experts], 1)
    many = scorer(x, index)
    few = torch.cat([scorer(x[i : i + 8], index[i : i + 8]) for i in range(0, 80, 8)])
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "features"), [(300, 40), (41, 40), (40, 40), (12, 40)])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_the_ridge_of_few_rows_is_the_same_minimum(rows, features, strength):
    """Against the definition: least squares with a row sqrt(penalty) e_i per feature, the constant left free."""
    generator = torch.Generator().manual_seed(rows)
    z = torch.cat([torch.randn(rows, features, generator=generator), torch.ones(rows, 1)], 1).double()
    y = torch.randn(rows, 3, generator=generator).double()
    penalty = strength * ((z[:, :-1] - z[:, :-1].mean(0)) ** 2).sum() / features + 1e-12
    bars = torch.cat([penalty.sqrt() * torch.eye(features), torch.zeros(features, 1)], 1).double()
    expected = torch.linalg.lstsq(torch.cat([z, bars]), torch.cat([y, torch.zeros(features, 3).double()])).solution
    assert torch.allclose(ridge_fit_module._Rows.of(z[:, :-1], y).solve(strength), expected, atol=1e-9)

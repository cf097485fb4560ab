"""Skip plans on tiny models of every kind of router: softmax, normalised softmax, sigmoid with bias, group-limited."""

from dataclasses import replace

import pytest
import torch

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.observe import normalises
from moe_prism.elastic.runtime import experts_per_token
from moe_prism.frontier.measure import measure
from moe_prism.point import FULL, RoutingStage
from moe_prism.routing.score_mass import score_mass
from moe_prism.routing.token_threshold import ser
from tests.elastic.common import computed
from tests.parity.families import build

IDS = torch.arange(3, 19)[None] % 31 + 2
# softmax; normalised softmax; sigmoid with bias, group-limited; the same with another spelling
FAMILIES = {"olmoe": False, "qwen3_moe": True, "deepseek_v3": True, "glm4_moe": True, "gpt_oss": True, "deepseek_v2": False}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def model(family):
    model = build(family)
    if family == "qwen3_moe":
        for module in model.modules():
            if hasattr(module, "norm_topk_prob"):
                module.norm_topk_prob = True
    return model


def grouped(model):
    """Routers that choose among groups get two of them."""
    for module in model.modules():
        if hasattr(module, "n_group"):
            module.n_group, module.topk_group = 2, 1
    return model


def every(layers, k, n):
    few, whole = (n,) * layers, (k,) * layers
    batch = RoutingStage(layers=few, stage="batch-redistribution", parameters={"base": ((1.0,),) * layers})
    cutoff = RoutingStage(layers=whole, stage="weight-cutoff", parameters={"cutoff": ((0.3,),) * layers})
    return [RoutingStage(layers=few), ser(whole, 0.8), score_mass(whole, 0.4), cutoff, batch]


def point(stage, budget=1.0):
    """Whole experts, and of the slots that a stage leaves a share."""
    return replace(FULL.with_budget(budget, "whole-experts"), routing=() if stage is None else (stage,))


def touched(layer):
    return int(layer.counter.per_token["experts"].sum())


@torch.no_grad()
def test_neutral_plans_change_no_bit(model):
    model = grouped(model)
    before = model(IDS).logits
    elastic = attach(model, 1)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].parts.layer)
    plans = [RoutingStage(layers=(k,) * layers), ser((k,) * layers, 0.0), score_mass((k,) * layers, 0.0)]
    for plan in plans:
        for keep_mass in (None, True, False):
            with operating_point(model, point=point(replace(plan, keep_mass=keep_mass))):
                assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_every_stage_runs_and_skips(model):
    model = grouped(model)
    elastic = attach(model, 1)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].parts.layer)
    for plan in every(layers, k, 1):
        with operating_point(model, point=point(plan)), elastic.count():
            assert torch.isfinite(model(IDS).logits).all()
        for layer in elastic.layers:
            counter = layer.counter
            assert counter.tokens <= counter.kept == counter.chosen == touched(layer) <= k * counter.tokens
        if plan.stage in ("top-n", "batch-redistribution"):
            assert all(layer.counter.kept == layer.counter.tokens for layer in elastic.layers)


@torch.no_grad()
def test_keep_mass_follows_the_router(family, model):
    elastic = attach(grouped(model), 1)
    assert normalises(elastic) is FAMILIES[family]
    [group] = bind(elastic, [point(RoutingStage(layers=(1,) * len(elastic.layers)))]).groups
    assert group.stages[0].keep_mass is FAMILIES[family]


def set_top_k(model, k):
    """Tell every router of a model to choose k experts; what a user would do in config.json."""
    for module in model.modules():
        for name in ("top_k", "num_experts_per_tok"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, k)


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v2"], indirect=True)
def test_uniform_is_the_model_with_a_smaller_top_k(family, model):
    """For routers that rank by the weight they give. Others rank by biased or grouped scores and may choose other experts."""
    elastic = attach(model, 1)
    with operating_point(model, point=point(RoutingStage(layers=(1,) * len(elastic.layers)))):
        ours = model(IDS).logits
    set_top_k(model, 1)
    torch.testing.assert_close(ours, model(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_ran_is_what_was_counted(model):
    """Slots that the reference executor computes, counted there, against the counters and the cost in weights."""
    model = grouped(model)
    elastic = attach(model, 2)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].parts.layer)
    for plan, budget in ((every(layers, k, 1)[1], 1.0), (every(layers, k, 1)[2], 0.6), (every(layers, k, 1)[4], 1.0)):
        with computed(elastic, "reference"), watched(elastic) as executed:
            [found] = measure(model, IDS, [point(plan, budget)])
        cost = found.cost
        tokens = IDS.numel()
        blocks = sum(elastic.layers[i].parts.block * n for i, n in executed.items())
        layer = elastic.layers[0].parts.layer
        matrices = 3 if layer.gate is not None else 2
        biases = sum(b is not None for b in (layer.gate_bias, layer.up_bias))
        expected = blocks * (matrices * layer.hidden + biases) / tokens
        down = sum(map(touched, elastic.layers)) * layer.hidden / tokens if layer.down_bias is not None else 0
        lost = sum(x.counter.chosen - touched(x) for x in elastic.layers)
        assert lost >= 0
        assert abs(cost.k_slots - sum(executed.values()) / tokens / layers) < 1e-9
        assert abs(cost.active_expert_params - expected - down) < 1e-6 * expected
        assert cost.flops_per_token == 2 * cost.active_expert_params


class watched:
    """Counts the calls of `activations` per layer: one per slot in the reference executor."""

    def __init__(self, elastic):
        self.elastic, self.count = elastic, {}

    def __enter__(self):
        for layer in self.elastic.layers:
            moe = layer.parts.layer
            self.count[moe.index] = 0

            def counting(expert, x, neurons=slice(None), *, moe=moe):
                self.count[moe.index] += 1
                return type(moe).activations(moe, expert, x, neurons)

            moe.activations = counting
        return self.count

    def __exit__(self, *_):
        for layer in self.elastic.layers:
            del layer.parts.layer.activations


@torch.no_grad()
def test_all_ways_to_compute_agree(model):
    elastic = attach(grouped(model), 2)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].parts.layer)
    for plan in every(layers, k, 1):
        for budget in (1.0, 0.6):
            outputs = []
            for way in ("reference", "grouped", "auto"):
                with operating_point(model, point=point(plan, budget)), computed(elastic, way):
                    outputs.append(model(IDS).logits)
            for other in outputs[1:]:
                torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_skipping_composes_with_sub_experts():
    """Each neutral: the other alone, to the bit. Both: no slot outside what the plan left, and a budget is a share of that."""
    model = build("olmoe")
    elastic = attach(model, 4)
    layers, k = len(elastic.layers), 2
    skip, none = RoutingStage(layers=(1,) * layers), RoutingStage(layers=(k,) * layers)

    def run(budget, plan):
        with operating_point(model, point=point(plan, budget)), elastic.count():
            return model(IDS).logits, [layer.counter.kept / layer.counter.tokens for layer in elastic.layers]

    assert torch.equal(run(0.5, none)[0], run(0.5, None)[0])
    assert torch.equal(run(1.0, none)[0], run(1.0, None)[0])
    assert run(1.0, skip)[1] == [4.0] * layers
    assert run(0.5, skip)[1] == [2.0] * layers
    elastic.always_split = True
    torch.testing.assert_close(run(1.0, skip)[0], run(0.5, None)[0])  # whole experts at half of k=2 is one whole expert


@torch.no_grad()
def test_plans_are_per_token_and_swap_between_steps():
    model = build("olmoe")
    elastic = attach(model, 1)
    layers = len(elastic.layers)
    points = [point(RoutingStage(layers=(n,) * layers)) for n in (2, 1)]
    layer = elastic.layers[0].parts.layer
    x = torch.randn(6, layer.hidden, generator=torch.Generator().manual_seed(0))
    index, weight = torch.tensor([[0, 1]] * 6), torch.rand(6, 2)
    which = torch.tensor([0, 1, 0, 1, 1, 0])
    with operating_point(model, point=points, which=which):
        mixed = elastic.layers[0](x, index, weight)
    for t in range(6):
        with operating_point(model, point=points, which=int(which[t])):
            torch.testing.assert_close(elastic.layers[0](x[t : t + 1], index[t : t + 1], weight[t : t + 1])[0], mixed[t])
    bound = bind(elastic, [point(RoutingStage(layers=(n,) * layers, keep_mass=False)) for n in (2, 1)])
    outputs = []
    for number in (0, 1, 0):  # the step is read at every forward
        elastic.step = Step(bound, number)
        outputs.append(model(IDS).logits)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])

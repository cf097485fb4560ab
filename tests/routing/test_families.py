"""Plans on tiny models of every kind of router: softmax, normalised softmax, sigmoid with bias, group-limited."""

import pytest
import torch
from moe_prism.elastic.bind_plans import made, normalises, policy_for

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.runtime import Setting, experts_per_token
from moe_prism.frontier.measure import measure
from moe_prism.routing import SkipPlan
from moe_prism.routing.score_mass import score_mass
from moe_prism.routing.token_threshold import ser
from tests.parity.families import build

IDS = torch.arange(3, 19)[None] % 31 + 2
# softmax; normalised softmax; sigmoid with bias, group-limited; the same with another spelling
FAMILIES = {"olmoe": False, "qwen3_moe": True, "deepseek_v3": True, "glm4_moe": True, "gpt_oss": True, "deepseek_v2": False}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def model(family):
    made = build(family)
    if family == "qwen3_moe":
        for module in made.modules():
            if hasattr(module, "norm_topk_prob"):
                module.norm_topk_prob = True
    return made


def grouped(model):
    """Routers that choose among groups get two of them."""
    for module in model.modules():
        if hasattr(module, "n_group"):
            module.n_group, module.topk_group = 2, 1
    return model


def every(layers, k, n):
    batch = SkipPlan((n,) * layers, "batch-redistribution", {"base": ((1.0,),) * layers})
    level = SkipPlan((k,) * layers, "weight-level", {"level": ((0.3,),) * layers})
    whole = (k,) * layers
    return [SkipPlan((n,) * layers), ser(whole, 0.8), score_mass(whole, 0.4), level, batch]


@torch.no_grad()
def test_neutral_plans_change_no_bit(model):
    model = grouped(model)
    before = model(IDS).logits
    elastic = attach(model, 1)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].plan.layer)
    plans = [SkipPlan((k,) * layers), ser((k,) * layers, 0.0), score_mass((k,) * layers, 0.0)]
    for plan in plans:
        for keep_mass in (None, True, False):
            with operating_point(model, routing=plan.with_(keep_mass=keep_mass)):
                assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_every_policy_runs_and_skips(model):
    model = grouped(model)
    elastic = attach(model, 1)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].plan.layer)
    for plan in every(layers, k, 1):
        elastic.reset_counters()
        with operating_point(model, routing=plan):
            assert torch.isfinite(model(IDS).logits).all()
        for layer in elastic.layers:
            counter = layer.counter
            assert counter.tokens <= counter.kept == counter.chosen == counter.touched <= k * counter.tokens
        if plan.policy in ("top-n", "batch-redistribution"):
            assert all(layer.counter.kept == layer.counter.tokens for layer in elastic.layers)


@torch.no_grad()
def test_keep_mass_follows_the_router(family, model):
    elastic = attach(grouped(model), 1)
    assert normalises(elastic) is FAMILIES[family]
    assert policy_for(elastic, SkipPlan((1,) * len(elastic.layers))).keep_mass is FAMILIES[family]


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
    with operating_point(model, routing=SkipPlan((1,) * len(elastic.layers))):
        ours = model(IDS).logits
    set_top_k(model, 1)
    torch.testing.assert_close(ours, model(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_ran_is_what_was_counted(model):
    """Slots that the reference executor computes, counted there, against the counters and the cost in weights."""
    model = grouped(model)
    elastic = attach(model, 2)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].plan.layer)
    for plan, budget in ((every(layers, k, 1)[1], 1.0), (every(layers, k, 1)[2], 0.6), (every(layers, k, 1)[4], 1.0)):
        setting = Setting(budget, "linear", executor="reference", routing=policy_for(elastic, plan))
        with watched(elastic) as executed:
            [(_, cost)] = measure(model, elastic, IDS, [setting])
        tokens = IDS.numel()
        blocks = sum(elastic.layers[i].plan.block * n for i, n in executed.items())
        layer = elastic.layers[0].plan.layer
        matrices = 3 if layer.gate is not None else 2
        biases = sum(b is not None for b in (layer.gate_bias, layer.up_bias))
        expected = blocks * (matrices * layer.hidden + biases) / tokens
        down = sum(x.counter.touched for x in elastic.layers) * layer.hidden / tokens if layer.down_bias is not None else 0
        lost = sum(x.counter.chosen - x.counter.touched for x in elastic.layers)
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
            moe = layer.plan.layer
            self.count[moe.index] = 0

            def counting(expert, x, neurons=slice(None), *, moe=moe):
                self.count[moe.index] += 1
                return type(moe).activations(moe, expert, x, neurons)

            moe.activations = counting
        return self.count

    def __exit__(self, *_):
        for layer in self.elastic.layers:
            del layer.plan.layer.activations


@torch.no_grad()
def test_executors_agree(model):
    elastic = attach(grouped(model), 2)
    layers, k = len(elastic.layers), experts_per_token(model, elastic.layers[0].plan.layer)
    for plan in every(layers, k, 1):
        for budget in (1.0, 0.6):
            outputs = []
            for executor in ("reference", "grouped", "auto"):
                with operating_point(model, budget, rule="linear", executor=executor, routing=plan):
                    outputs.append(model(IDS).logits)
            for other in outputs[1:]:
                torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_skipping_composes_with_sub_experts():
    """Each neutral: the other alone, to the bit. Both: no slot outside what the plan left, and a budget is a share of that."""
    model = build("olmoe")
    elastic = attach(model, 4)
    layers, k = len(elastic.layers), 2
    skip, none = SkipPlan((1,) * layers), SkipPlan((k,) * layers)

    def run(budget, plan):
        elastic.reset_counters()
        with operating_point(model, budget, rule="linear", routing=plan):
            return model(IDS).logits, [layer.counter.kept / layer.counter.tokens for layer in elastic.layers]

    assert torch.equal(run(0.5, none)[0], run(0.5, None)[0])
    assert torch.equal(run(1.0, none)[0], run(1.0, None)[0])
    assert run(1.0, skip)[1] == [4.0] * layers
    assert run(0.5, skip)[1] == [2.0] * layers
    elastic.always_split = True
    torch.testing.assert_close(run(1.0, skip)[0], run(0.5, None)[0])  # linear at half of k=2 is one whole expert


@torch.no_grad()
def test_plans_are_per_token_and_swap_between_steps():
    model = build("olmoe")
    elastic = attach(model, 1)
    layers = len(elastic.layers)
    plans = [SkipPlan((2,) * layers), SkipPlan((1,) * layers)]
    layer = elastic.layers[0].plan.layer
    x = torch.randn(6, layer.hidden, generator=torch.Generator().manual_seed(0))
    index, weight = torch.tensor([[0, 1]] * 6), torch.rand(6, 2)
    level = torch.tensor([0, 1, 0, 1, 1, 0])
    with operating_point(model, routing=plans, level=level):
        mixed = elastic.layers[0](x, index, weight)
    for t in range(6):
        with operating_point(model, routing=plans, level=int(level[t])):
            torch.testing.assert_close(elastic.layers[0](x[t : t + 1], index[t : t + 1], weight[t : t + 1])[0], mixed[t])
    policy = made([plan.with_(keep_mass=False) for plan in plans])
    outputs = []
    for which in (0, 1, 0):  # the setting is read at every step
        elastic.setting = Setting(routing=policy, level=which)
        outputs.append(model(IDS).logits)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])

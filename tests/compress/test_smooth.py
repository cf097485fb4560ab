"""Inputs that are evened out: nothing changes but the range of what is rounded; every expert has its tokens."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.decoded import SOURCE, matrices
from moe_prism.compress.quantize.smooth import aligned_clip, exponents, rounded_router, with_floor
from moe_prism.compress.quantize.smoothed import SmoothChange
from moe_prism.errors import CorruptError, UsageError
from moe_prism.methods.find import method
from moe_prism.model import find_layers
from moe_prism.model.norm_readers import norm_readers
from moe_prism.model.scores import router_weight
from moe_prism.point import WeightChange

from .tiny import BASE, FAMILIES, IDS, build, logits

HIDDEN = BASE["hidden_size"]


def routed(kind):
    model = build(kind)
    return model, [layer for layer in find_layers(model) if not layer.is_dense]


def change_for(layers, bits=4.0, seed=0, **more):
    """Of whole powers of two, unless `steps` are given."""
    g = torch.Generator().manual_seed(seed)
    rows = tuple(tuple(torch.randint(-3, 4, (layer.hidden,), generator=g).tolist()) for layer in layers)
    return SmoothChange(QuantizeChange(Rtn(), bits, 32), rows, **more)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_folding_changes_nothing_before_rounding(kind, steps):
    """Whole powers of two no bit. A softmax router, a sigmoid one, shared experts, biases; the weights are the same afterwards."""
    model, layers = routed(kind)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    up = layers[0].up.clone()
    with change_for(layers, SOURCE, steps=steps).installed(model, layers):
        assert not torch.equal(layers[0].up, up)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
        assert steps > 1 or torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_what_is_stored_is_the_scaled_expert():
    model, layers = routed("softmax")
    change, layer = change_for(layers, router=4, clips=(0.8, 0.9)), layers[0]
    s = 2.0 ** torch.tensor(change.exponents[0]).float()
    *first, down = (w.clone() for w in matrices(layer))
    router = router_weight(model, layer).clone()
    with change.installed(model, layers):
        *now, last = matrices(layer)
        for found, source in zip(now, first, strict=True):
            assert torch.equal(found, Rtn().decode(Rtn().encode(source * s, 4, 32), 4))
        assert torch.equal(last, Rtn().decode(Rtn().encode(down, 4, 32), 4))
        assert torch.equal(router_weight(model, layer), rounded_router(router * s, 4, 0.8))
    assert torch.equal(router_weight(model, layer), router)
    assert change_of(change.part()) == change


def test_what_is_no_smoothing_of_this_model_is_refused():
    model, layers = routed("softmax")
    part = change_for(layers).part()
    for wrong in (
        {"exponents": [[99] * HIDDEN] * 2},
        {"exponents": []},
        {"router": 9},
        {"clips": [0.0]},
        {"codec": "rtn", "more": 1},
    ):
        with pytest.raises((CorruptError, UsageError)):
            change_of(WeightChange(change="smooth", settings={**part.settings, **wrong}))
    for wrong in (change_for(layers[:1]), change_for(layers, router=8)):
        with pytest.raises(UsageError, match="not that of this model"):
            wrong.installed(model, layers)
    for text in ("alpha=1.5", "steps=0", "router=9", "bits=9", "bits=4:group=5"):
        with pytest.raises(UsageError):
            method(f"eaquant:{text}")


def test_a_dense_model_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **BASE))
    with pytest.raises(UsageError, match="is a dense MLP"):
        norm_readers(model, find_layers(model))


def test_a_norm_with_a_reader_nobody_knows_is_refused():
    model, layers = routed("softmax")
    block = model.get_submodule(layers[0].block_name)
    forward = block.forward
    block.forward = lambda x: forward(x) + x  # reads the norm past every matrix
    with pytest.raises(UsageError, match="not known to the last one"):
        norm_readers(model, layers)


@torch.no_grad()
def test_inputs_of_a_loud_channel_come_down():
    _, layers = routed("softmax-normalised")
    x = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50
    found = exponents(layers[0], [x] * layers[0].num_experts, 0.6, 1)
    quiet = x / 2.0 ** found.float()
    spread = [float(t.abs().amax(0).max() / t.abs().amax(0).median()) for t in (x, quiet)]
    assert spread[1] < spread[0] / 2 and int(found.argmax()) == 3


def test_an_expert_with_few_tokens_gets_those_that_came_nearest():
    model, layers = routed("softmax")
    work = Pass(model, layers, Settings(collectors=("counts", "tokens"), capacity=64))
    work.run(IDS)
    own = work.statistics().layers[0]
    own.values["tokens"]["kept"][0] = 1  # the rest is not to be seen
    found, plain = with_floor(model, layers[0], own, 1.0, 2), [own.inputs(e) for e in range(layers[0].num_experts)]
    mean = int(own.values["counts"]["count"].double().mean())
    assert len(found[0][0]) == mean == len(found[0][1]) and torch.equal(found[0][0][:1], plain[0][0])
    logits = found[0][0][1:] @ router_weight(model, layers[0]).T
    gap = logits[:, 0] - logits.topk(2, 1).values[:, -1]
    assert torch.equal(gap, gap.sort(descending=True).values)
    rich = [e for e, (x, _) in enumerate(plain) if len(x) >= mean]
    assert rich and all(torch.equal(found[e][0], plain[e][0]) for e in rich)


def test_a_router_is_rounded_so_that_it_chooses_as_before():
    """Rows with one large weight, on inputs that hardly use it: the range gives it up."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=g), torch.randn(256, 32, generator=g)
    weight[:, 0], x[:, 0] = 6.0, 0.0
    clip = aligned_clip(weight, x, 4, 2)
    top = [(x @ w.T).topk(2, 1).indices for w in (weight, rounded_router(weight, 4, 1.0), rounded_router(weight, 4, clip))]
    same = [float((top[0] == other).float().mean()) for other in top[1:]]
    assert clip < 1 and same[1] > same[0]

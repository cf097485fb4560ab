"""The repair: its fit against a plain least-squares solver, its use against a loop, and full budget untouched."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.elastic import LayerParts, attach, operating_point
from moe_prism.elastic.compensate import compensator
from moe_prism.elastic.execute.plain import grouped, reference
from moe_prism.elastic.repair import Repaired, band_of
from moe_prism.elastic.side_tensors import REPAIR
from moe_prism.errors import DoesNotFit
from moe_prism.model import find_layers
from moe_prism.point import OperatingPoint, SlotRule
from moe_prism.recover.repair import PRIOR, STRENGTHS, Normal
from moe_prism.recover.run import groups
from tests.parity.families import build

LAYOUTS = ["olmoe", "gpt_oss", "aria", "nemotron_h"]  # concatenated, interleaved with bias, transposed, ungated
N = 4
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module", params=LAYOUTS)
def layer(request):
    return find_layers(build(request.param), dense=False)[0]


def batch(layer, tokens, seed, k=2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.hidden, generator=g)
    index = torch.stack([torch.randperm(layer.num_experts, generator=g)[:k] for _ in range(tokens)])
    return x, index, torch.rand(tokens, k, generator=g), torch.rand(tokens, k, N, generator=g) < 0.5


def plan_with(layer, bands, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (bands, layer.num_experts, layer.hidden, layer.width)
    return LayerParts(layer, N, 0, {REPAIR: torch.randn(shape, generator=g).bfloat16()})


@given(n_sub=st.integers(2, 40), bands=st.integers(1, 39))
def test_bands_cover_what_is_cut_and_nothing_else(n_sub, bands):
    bands = min(bands, n_sub - 1)
    found = band_of(torch.arange(n_sub + 1), bands, n_sub).tolist()
    assert found[0] == found[-1] == -1
    assert found[1:-1] == sorted(found[1:-1]) and set(found[1:-1]) == set(range(bands))


@torch.no_grad()
@pytest.mark.parametrize("execute", [grouped, reference])
@pytest.mark.parametrize("bands", [1, 2, 3])
def test_cut_experts_are_projected_by_their_band(layer, bands, execute):
    plan = plan_with(layer, bands)
    x, index, weight, keep = batch(layer, 40, seed=1)
    index[0, 0] = -1  # a token whose router chose one expert only
    keep[0, 0] = False
    expected = torch.zeros_like(x)
    for t in range(len(x)):
        for c in range(2):
            e, kept = int(index[t, c]), keep[t, c]
            if not kept.any():
                continue
            down = layer.down[e]
            dropped = N - int(kept.sum())
            if dropped:
                down = down + plan.tensors[REPAIR][(dropped - 1) * bands // (N - 1), e].float()
            y = down @ (layer.activations(e, x[t : t + 1])[0] * kept.repeat_interleave(plan.block))
            expected[t] += weight[t, c] * (y if layer.down_bias is None else y + layer.down_bias[e])
    found = Repaired(plan)(execute, x, index, weight, keep)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("always_split", [False, True])
def test_full_budget_is_untouched_in_any_batch(always_split):
    model = build("olmoe")
    before = model(IDS).logits
    layers = find_layers(model)
    elastic = attach(model, N, tensors=[plan_with(layer, 3).tensors for layer in layers], layers=layers)
    elastic.always_split = always_split
    with operating_point(model, 1.0, rule="whole-experts"):
        torch.testing.assert_close(model(IDS).logits, before)
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, IDS.numel(), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with operating_point(model, 1.0, rule="whole-experts"):
        whole = mlp(x)
    budgets = torch.linspace(0.3, 1.0, IDS.numel())
    with operating_point(model, budgets, rule="whole-experts"):
        mixed = mlp(x)
    torch.testing.assert_close(mixed[0, -1], whole[0, -1])
    assert not torch.allclose(mixed[0, 0], whole[0, 0])
    for t, budget in enumerate(budgets.tolist()):
        with operating_point(model, budget, rule="whole-experts"):
            torch.testing.assert_close(mlp(x)[0, t], mixed[0, t])


def pairs(plan, bands, x, index, weight, keep):
    """(band, expert) -> weighted kept activations z [S, f] and what is missing y [S, d], one row at a time, float64."""
    rows = {}
    for t, c in ((t, c) for t in range(len(x)) for c in range(index.shape[1])):
        dropped = N - int(keep[t, c].sum())
        if 0 < dropped < N:
            e = int(index[t, c])
            a = plan.layer.activations(e, x[t : t + 1])[0].double()
            z = a * keep[t, c].repeat_interleave(plan.block)
            y = plan.layer.down[e].double() @ (a - z)
            rows.setdefault(((dropped - 1) * bands // (N - 1), e), []).append((weight[t, c] * z, weight[t, c] * y))
    return {key: tuple(torch.stack(side) for side in zip(*found, strict=True)) for key, found in rows.items()}


def ridge(z, y, strength):
    """Least squares by QR, the ridge as extra rows: [f, d]."""
    more = strength.sqrt() * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.linalg.lstsq(torch.cat([z, more]), torch.cat([y, torch.zeros(len(more), y.shape[1], dtype=y.dtype)])).solution


@torch.no_grad()
@pytest.mark.parametrize("bands", [1, 3])
def test_the_fit_is_that_of_a_least_squares_solver(layer, bands):
    """Independent reference: rows instead of normal equations, residuals instead of their quadratic form."""
    plan = LayerParts(layer, N, 0)
    parts = [batch(layer, 200, seed) for seed in (2, 3)]
    normal = Normal(plan, bands)
    for held, (x, index, weight, keep) in enumerate(parts):
        normal.add(x, index, weight, [keep, keep], held=bool(held))  # two budgets that agree: the same fit
    found = normal.solve().float()
    fitted, tested = (pairs(plan, bands, *part) for part in parts)
    scale = torch.zeros(bands, layer.num_experts, dtype=torch.float64)
    for key in fitted | tested:
        scale[key] = sum(2 * part[key][0].square().sum() / layer.width for part in (fitted, tested) if key in part)
    for b, e in fitted.keys() & tested.keys():
        size = (scale[b, e] + PRIOR * scale[b].mean()) / 2
        (z, y), (z_held, y_held) = fitted[b, e], tested[b, e]
        errors = [float((y_held - z_held @ ridge(z, y, s * size)).square().sum()) for s in STRENGTHS]
        best = min(errors)
        expected = torch.zeros(layer.hidden, layer.width)
        if best < float(y_held.square().sum()):
            expected = ridge(torch.cat([z, z_held]), torch.cat([y, y_held]), STRENGTHS[errors.index(best)] * size).T.float()
        torch.testing.assert_close(found[b, e], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_on_its_own_data_a_repair_never_hurts(layer, seed, tokens):
    plan = LayerParts(layer, N, 0)
    x, index, weight, keep = batch(layer, tokens, seed)
    normal = Normal(plan, 3)
    normal.add(x, index, weight, [keep])
    assert normal.solve().abs().max() == 0  # nothing is held out: nothing says that a repair helps
    normal.add(x, index, weight, [keep], held=True)
    delta = normal.solve().double().transpose(-1, -2)
    if len(pairs(plan, 3, x, index, weight, keep)) >= 8:  # of few, all that is kept may be zero by a squared ReLU
        assert delta.abs().max() > 0
    for (b, e), (z, y) in pairs(plan, 3, x, index, weight, keep).items():
        assert float((y - z @ delta[b, e]).square().sum()) <= 1.001 * float(y.square().sum())


@torch.no_grad()
@pytest.mark.parametrize("method", ["mean", "scale"])
def test_a_repair_is_of_what_compensation_leaves(layer, method):
    """On its own data, at the only budget there is, the two together miss less than compensation alone."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"mean": ("vectors", (layer.num_experts, N, layer.hidden)), "scale": ("factors", (layer.num_experts, N + 1))}
    name, shape = shapes[method]
    tensor = 0.5 + torch.randn(shape, generator=generator) * 0.3
    plan = LayerParts(layer, N, 0, {f"compensate.{method}.{name}": tensor})
    x, index, weight, _ = batch(layer, 300, 6)
    index = index[:, :1].contiguous()  # one expert per token: errors of several add up, each is least alone
    weight, keep = weight[:, :1].contiguous(), torch.rand(300, 1, N, generator=generator) < 0.6
    keep[..., 0] = True
    normal = Normal(plan, 3)
    for held in (False, True):
        normal.add(x, index, weight, [keep], held=held)
    repaired = LayerParts(layer, N, 0, {**plan.tensors, REPAIR: normal.solve()})
    whole = reference(plan, x, index, weight, torch.ones_like(keep))
    extra = compensator(plan)
    scaled, added = extra.weights(index, weight, keep), extra(x, index, weight, keep)
    before = whole - reference(plan, x, index, scaled, keep) - added
    after = whole - Repaired(repaired)(reference, x, index, scaled, keep) - added
    assert after.square().sum() < 0.9 * before.square().sum()


@torch.no_grad()
def test_an_expert_that_is_never_cut_keeps_its_projection(layer):
    normal = Normal(LayerParts(layer, N, 0), 3)
    x, index, weight, keep = batch(layer, 20, 4)
    index[:] = torch.tensor([0, 1])
    for held in (False, True):
        normal.add(x, index, weight, [keep, torch.ones_like(keep), torch.zeros_like(keep)], held=held)
    found = normal.solve()
    assert found[:, 2:].abs().max() == 0 and found[:, :2].abs().max() > 0
    index[:] = -1
    normal.add(x, index, weight, [keep])
    assert torch.equal(normal.solve(), found)


@torch.no_grad()
def test_what_solving_holds_is_foreseen(monkeypatch):
    plan = attach(build("olmoe"), N).layers[0].parts
    normal, held, own = Normal(plan, 3), 0, torch.Tensor.sum

    def summed(tensor, *given, **named):
        nonlocal held
        found = own(tensor, *given, **named)
        held += found.nbytes
        return found

    assert normal.gram.nbytes + normal.cross.nbytes == Normal.bytes(plan, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sum", summed)
        found = normal.solve()
    assert held + found.nbytes == Normal.solving_bytes(plan, 3)


def test_layers_share_a_pass_as_far_as_memory_goes():
    layers = attach(build("olmoe"), N).layers
    size = Normal.bytes(layers[0].parts, 3)
    assert groups(layers, 3, size * len(layers)) == [list(range(len(layers)))]
    assert groups(layers, 3, size) == [[i] for i in range(len(layers))]
    assert [len(g) for g in groups(layers, 3, 2 * size)][:1] == [2]
    with pytest.raises(DoesNotFit, match="--memory-mib"):
        groups(layers, 3, size - 1)


@torch.no_grad()
def test_a_change_of_weights_reaches_the_repair_and_leaves_none_behind():
    """The repaired projections are made of the weights: others while a point changes those, and the old ones afterwards."""
    half = OperatingPoint(slots=SlotRule(budget=0.5, rule="product", scorer="oracle"))
    found = []
    for order in ((0, 1), (1, 0)):
        model = build("olmoe")
        layers = find_layers(model, dense=False)
        elastic = attach(model, N, tensors=[plan_with(own, 1, seed=own.index).tensors for own in layers], layers=layers)
        coarse = QuantizeChange(Rtn(), 2.0, 32).part()
        points = half, replace(half, weights=coarse)
        logits = {}
        for number in order:
            with elastic.at([points[number]]):
                logits[number] = model(input_ids=IDS).logits
        found.append([logits[0], logits[1]])
    assert not torch.equal(*found[0])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))

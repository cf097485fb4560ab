"""Statistics of neurons against their definitions by loops and by autograd, merged, saved and continued."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_prism.calibrate.layerwise import LayerwisePass
from moe_prism.calibrate.run import Pass, Settings
from moe_prism.checkpoint import LayerStream
from moe_prism.errors import UsageError
from moe_prism.model import find_layers
from tests.compress.tiny import build, save
from tests.tiers import by_night

NAMES = ("neurons", "gradients")
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(4))


def run(model, ids=IDS) -> Pass:
    work = Pass(model, find_layers(model), Settings(collectors=NAMES, batch=2))
    work.run(ids)
    return work


def by_loops(model) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Token by token: activations as leaves of autograd, and the loss of all windows added up."""
    layers = find_layers(model)
    found = [{name: {} for name in NAMES} for _ in layers]
    seen = [[] for _ in layers]

    def watched(layer):
        def experts(x, index, weight):
            rows = []
            for t in range(len(x)):
                y = torch.zeros_like(x[t])
                for e, g in zip(index[t].tolist(), weight[t], strict=True):
                    a = layer.activations(e, x[t : t + 1])
                    a.retain_grad()
                    seen[layer.index].append((e, g.detach(), a))
                    out = layer.project(e, a)[0]
                    y = y + g * (out if layer.down_bias is None else out + layer.down_bias[e])
                rows.append(y)
            return torch.stack(rows)

        return experts

    for layer in layers:
        layer.install(watched(layer))
    logits = model(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for layer in layers:
        layer.uninstall()
    model.zero_grad()
    for layer, rows, own in zip(layers, seen, found, strict=True):
        shape = layer.num_experts, layer.width
        a2, ga2, size, peak, gated, s2, p2, p, pa = (torch.zeros(shape, dtype=torch.float64) for _ in range(9))
        for e, g, act in rows:
            a, slope = act.detach()[0].double(), act.grad[0].double()
            a2[e] += a.square()
            ga2[e] += (g * a).square()
            size[e] += a.abs()
            peak[e], gated[e] = torch.maximum(peak[e], a.abs()), torch.maximum(gated[e], (g * a).abs())
            s2[e] += slope.square()
            p2[e] += (a * slope).square()
            p[e] += a * slope
            pa[e] += (a * slope).abs()
        own["neurons"] = {"sq": a2, "gated_sq": ga2, "abs": size, "max": peak, "gated_max": gated}
        own["gradients"] = {"slope_sq": s2, "product_sq": p2, "product": p, "product_abs": pa}
    return found


@pytest.mark.parametrize("kind", by_night(["softmax", "router-bias", "group-sigmoid"], "group-sigmoid"))
def test_sums_are_those_of_their_definitions(kind):
    model = build(kind)
    statistics = run(model).statistics()
    for layer, mine, wanted in zip(find_layers(model), statistics.layers, by_loops(model), strict=True):
        for collector, values in wanted.items():
            for name, value in values.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(mine.values[collector][name].double(), value, rtol=1e-4, atol=1e-5 * scale)
            assert (
                int(mine.values[collector]["count"].sum()) == IDS.numel() * 2
                and int(mine.values[collector]["tokens"]) == IDS.numel()
            )
        sizes = {"E": layer.num_experts, "d": layer.hidden}
        mine.check("here", 64, sizes)


def test_passes_merge_and_continue():
    model = build("softmax")
    whole, parts = run(model), [run(model, IDS[:2]), run(model, IDS[2:])]
    for layer, mine in enumerate(whole.collectors):
        for name in NAMES:
            merged = parts[0].collectors[layer][name]
            merged.merge(parts[1].collectors[layer][name].state())
            for key, value in mine[name].state().items():
                torch.testing.assert_close(merged.state()[key].double(), value.double(), rtol=1e-6, atol=1e-12)
            held = sum(t.nbytes for t in mine[name].state().values())
            assert held <= mine[name].bytes_per_layer(find_layers(model)[layer], 64)
    first = Pass(model, find_layers(model), Settings(collectors=NAMES))
    first.run(IDS[:3])
    second = Pass(model, find_layers(model), Settings(collectors=NAMES))
    second.load(first.state())
    second.run(IDS)
    assert all(torch.equal(second.state()[key], value) for key, value in whole.state().items())


def test_each_domain_has_its_own_and_their_sum_is_that_of_all():
    model = build("softmax")
    work = Pass(model, find_layers(model), Settings(collectors=NAMES, domains=("a", "b")))
    work.run(IDS, parts=[("a", 1), ("b", 3)])
    for layer in work.statistics().layers:
        for name in NAMES:
            both = layer.domains["a"][name], layer.domains["b"][name]
            assert int(both[0]["tokens"]) == IDS.shape[1] and int(layer.values[name]["tokens"]) == IDS.numel()
            key = "sq" if name == "neurons" else "product"
            torch.testing.assert_close(both[0][key] + both[1][key], layer.values[name][key])


def test_the_model_is_as_it_was():
    model = build("softmax")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        run(model)
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_at_a_time_there_is_no_way_back(tmp_path):
    save("softmax", tmp_path / "source")
    stream = LayerStream(tmp_path / "source")
    with pytest.raises(UsageError, match="backward pass through the whole model"):
        LayerwisePass(stream, find_layers(stream.model), Settings(collectors=NAMES), together=True)

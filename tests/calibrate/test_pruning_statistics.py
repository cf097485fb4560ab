"""The collectors of pruning against brute force on a whole model, in any batching, merged, saved and continued."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_prism.calibrate import collectors
from moe_prism.calibrate.run import Pass, Settings
from moe_prism.calibrate.scores import KINDS, kind_of
from moe_prism.compress.prune import criteria
from moe_prism.compress.prune.protect import super_experts
from moe_prism.model import find_layers
from tests.compress.tiny import build
from tests.tiers import by_night

NAMES = ("counts", "outputs", "scores")
IDS = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(4))
KIND_OF = {"softmax": "softmax", "top-k-softmax": "softmax", "router-bias": "softmax", "group-softmax": "softmax",
           "softmax-normalised": "softmax", "sigmoid-bias": "sigmoid", "group-sigmoid": "sigmoid"}  # fmt: skip


def run(model, ids=IDS, batch: int = 2):
    work = Pass(model, find_layers(model), Settings(collectors=NAMES, batch=batch))
    work.run(ids)
    return work


@torch.no_grad()
def seen(model) -> list[dict]:
    """x, index, weight, residual stream and router input of every layer for all IDS, by plain hooks and family names."""
    rows: list[dict] = [{} for _ in find_layers(model)]
    handles = []
    decoders = [m for m in model.model.layers if any(layer.module in list(m.modules()) for layer in find_layers(model))]
    for row, layer, decoder in zip(rows, find_layers(model), decoders, strict=True):

        def experts(_m, args, kwargs, row=row):
            row["x"], row["index"], row["weight"] = [*args, *kwargs.values()][:3]

        def norm(_m, args, row=row):
            row["h"] = args[0].reshape(-1, args[0].shape[-1])

        handles += [layer.module.register_forward_pre_hook(experts, with_kwargs=True)]
        handles += [decoder.post_attention_layernorm.register_forward_pre_hook(norm)]
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("kind", by_night(["softmax", "router-bias", "group-sigmoid"], "group-sigmoid"))
@torch.no_grad()
def test_sums_are_those_of_brute_force(kind):
    model = build(kind)
    layers, statistics = find_layers(model), run(model).statistics()
    for layer, row, found in zip(layers, seen(model), statistics.layers, strict=True):
        out = {
            k: torch.zeros(layer.num_experts, dtype=torch.float64)
            for k in ("count", "norm", "norm_sq", "gated", "gated_sq", "easy", "max")
        }
        peak = 0.0
        for t in range(len(row["x"])):
            x, h = row["x"][t : t + 1], row["h"][t]
            o = {int(e): layer.stock(x, torch.tensor([[int(e)]]), torch.ones(1, 1))[0] for e in row["index"][t]}
            g = dict(zip(row["index"][t].tolist(), row["weight"][t].tolist(), strict=True))
            y = sum(g[e] * o[e] for e in o)
            turned = max(0.0, 1 - float(nn.functional.cosine_similarity(h, h + y, dim=0)))
            peak = max(peak, float((h + y).abs().max()))
            for e in o:
                n = float(o[e].norm())
                for key, value in (("count", 1), ("norm", n), ("norm_sq", n**2), ("gated", g[e] * n), ("gated_sq", (g[e] * n) ** 2),
                                   ("easy", turned * g[e] * n)):  # fmt: skip
                    out[key][e] += value
                out["max"][e] = max(float(out["max"][e]), float(o[e].abs().max()))
        mine = found.values["outputs"]
        for key, wanted in out.items():
            assert torch.allclose(mine[key].double(), wanted, rtol=1e-4, atol=1e-6), key
        assert abs(float(mine["hidden_max"]) - peak) < 1e-4 * peak
        assert int(mine["tokens"]) == int(mine["residual_tokens"]) == IDS.numel()
        assert torch.equal(mine["count"], found.values["counts"]["count"])


@pytest.mark.parametrize("kind", KIND_OF)
def test_router_probabilities_over_all_tokens(kind):
    model = build(kind)
    layers = find_layers(model)
    statistics, rows = run(model).statistics(), seen(model)
    for layer, row, found in zip(layers, rows, statistics.layers, strict=True):
        mine = found.values["scores"]
        assert KINDS[int(mine["kind"])] == KIND_OF[kind]
        gate = model.get_submodule(layer.name.rpartition(".")[0] + (".router" if kind == "router-bias" else ".gate"))
        with torch.no_grad():
            z = row["x"] @ gate.weight.T + (gate.bias if kind == "router-bias" else 0)
        p = z.softmax(-1) if KIND_OF[kind] == "softmax" else z.sigmoid() / z.sigmoid().sum(-1, keepdim=True)
        assert torch.allclose(mine["prob_sum"], p.double().sum(0), rtol=1e-4)
        assert abs(float(mine["prob_sum"].sum()) - IDS.numel()) < 1e-3


def test_batches_do_not_matter_and_passes_merge_and_continue():
    model = build("softmax")
    whole = run(model).collectors
    parts = [run(model, IDS[:4]).collectors, run(model, IDS[4:]).collectors]
    for layer, mine in enumerate(whole):
        for name in ("outputs", "scores"):
            merged = parts[0][layer][name]
            merged.merge(parts[1][layer][name].state())
            for key, value in mine[name].state().items():
                assert torch.allclose(merged.state()[key].double(), value.double(), rtol=1e-6), (name, key)
    first = Pass(model, find_layers(model), Settings(collectors=NAMES, batch=2))
    first.run(IDS[:4])
    second = Pass(model, find_layers(model), Settings(collectors=NAMES, batch=2))
    second.load(first.state())
    second.run(IDS)
    wanted = run(model).state()
    assert all(torch.equal(wanted[k], v) for k, v in second.state().items())


def test_the_pass_leaves_the_model_alone():
    model = build("softmax")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        run(model)
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_declared_memory_is_what_is_held():
    model = build("softmax")
    for layer, mine in zip(find_layers(model), run(model).collectors, strict=True):
        for name in NAMES:
            held = sum(t.nbytes for t in mine[name].state().values())
            assert held <= collectors.get(name).bytes_per_layer(layer, 64)


def test_every_collector_a_criterion_needs_exists():
    for name in criteria.names():
        assert set(criteria.get(name).needs) <= set(collectors.names())


def test_one_expert_per_token_compares_tokens():
    z = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    top = z.softmax(-1).topk(1)
    assert KINDS[kind_of(z, top.indices, top.values)] == "softmax"
    assert KINDS[kind_of(z, top.indices, 2.5 * z.sigmoid().gather(1, top.indices))] == "sigmoid"


def test_an_expert_with_outlier_outputs_is_found_and_protected():
    model = build("softmax")
    layers = find_layers(model)
    with torch.no_grad():
        layers[0].down[5] *= 1000
    values = [layer.values for layer in run(model).statistics().layers]
    assert [mask.nonzero().flatten().tolist() for mask in super_experts(values)] == [[5], []]

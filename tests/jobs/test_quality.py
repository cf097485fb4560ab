"""Quality falls with the budget and nothing else; frontier.json says what it costs."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

import moe_prism
from moe_prism.checkpoint import read_manifest
from moe_prism.data import token_windows
from moe_prism.elastic.base import Slots
from moe_prism.elastic.execute.plain import grouped
from moe_prism.elastic.rules.top_slots import TopSlots
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.elastic.scorers.oracle import Oracle
from moe_prism.errors import UsageError
from moe_prism.frontier import Frontier
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL

FRONTIER_KEYS = {"baseline_bits", "model", "source", "n_sub", "points", "baseline_topk", "provenance"}
POINT_KEYS = {
    "name", "rule", "budget", "k_slots", "ppl", "kl", "top1_agreement", "active_expert_params", "active_expert_bytes",
    "flops_per_token", "pareto", "resident_expert_bytes", "distinct_expert_bytes", "sends", "point",
}  # fmt: skip


@pytest.fixture(scope="module")
def nano(elastic_nano):
    return moe_prism.load(elastic_nano)


@pytest.fixture(scope="module")
def held_out(elastic_nano, nano):
    """2,048 tokens that calibration has not seen."""
    used = read_manifest(elastic_nano)["calibration"]["documents"]
    windows = token_windows(nano[1], "stdlib", "evaluation", length=256, tokens=2048, exclude=used)
    assert not set(windows.documents) & set(used)
    return windows.ids


def seen(model, layer, ids):
    """(x, index, weight) that reach one layer."""
    found = []

    def record(x, index, weight):
        found.append((x, index, weight))
        return layer.parts.layer.stock(x, index, weight)

    layer.parts.layer.install(record)
    model(input_ids=ids, use_cache=False)
    layer.parts.layer.install(layer)
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("position", [0, -1])
def test_more_slots_never_mean_a_worse_layer(nano, held_out, position):
    model = nano[0]
    layer = model._moe_prism.layers[position]
    plan = layer.parts
    x, index, weight = seen(model, layer, held_out[:2])
    norms = Oracle(plan)(x, index)
    slots = Slots(x, index, weight, torch.ones_like(index, dtype=torch.bool), plan.n_sub, lambda: norms)
    full = plan.layer.stock(x, index, weight).float()
    errors = []
    total = index.shape[1] * plan.n_sub
    for count in range(1, total + 1):
        keep = TopSlots(plan).keep(slots, torch.full((len(x),), count / total))
        assert int(keep.sum()) == count * len(x)
        errors.append(float((grouped(plan, x, index, weight, keep) - full).norm() / full.norm()))
    assert all(later <= earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 1e-5 < errors[0]


def test_sub_experts_beat_plain_top_k_at_equal_slots(nano, held_out):
    model = nano[0]
    elastic = model._moe_prism
    n_sub, slots = elastic.layers[0].parts.n_sub, slots_per_token(elastic)
    kept = [n_sub * k for k in range(slots // n_sub - 1, 0, -1)]
    points = [FULL.with_budget(count / slots, rule) for rule in ("product", "whole-experts") for count in kept]
    kl = [found.quality.kl for found in measure(model, held_out, points)]
    product, plain = kl[: len(kept)], kl[len(kept) :]
    assert all(ours < theirs for ours, theirs in zip(product, plain, strict=True)), (product, plain)
    assert product == sorted(product) and plain == sorted(plain)


@torch.no_grad()
def greedy(model, ids, budgets, steps):
    """Greedy tokens [B, steps] of prompts of equal length, row b at budgets[b], one batch."""
    past, rows, out = None, ids, []
    for _ in range(steps):
        with moe_prism.operating_point(model, torch.tensor(budgets).repeat_interleave(rows.shape[1]), rule="product"):
            result = model(input_ids=rows, past_key_values=past, use_cache=True)
        past, rows = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
        out.append(rows)
    return torch.cat(out, 1)


def test_d02_a_request_gives_the_same_tokens_alone_and_in_a_mixed_batch(nano, held_out):
    model = nano[0]
    prompts, budgets = held_out[:3, :24], [1.0, 0.5, 0.25]
    mixed = greedy(model, prompts, budgets, 12)
    for b, budget in enumerate(budgets):
        assert torch.equal(greedy(model, prompts[b : b + 1], [budget], 12), mixed[b : b + 1])
    # the rows really ran at their own price
    assert not torch.equal(greedy(model, prompts, [0.07] * 3, 12), mixed)


def test_generate_is_greedy_decoding_at_the_budget(nano):
    model, tokenizer = nano
    half = FULL.with_budget(0.5, "product")
    made = moe_prism.generate(model, tokenizer, "import os\n", point=half, sampling=GenerateOptions(max_tokens=8))
    ids = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    expected = greedy(model, ids, [0.5], 8)[0].tolist()
    assert tokenizer.decode(expected[: made.tokens], skip_special_tokens=True) == made.text
    assert made.tokens <= 8 and made.point == half


@pytest.fixture(scope="module")
def tiny_frontier(elastic_tiny, text_file):
    return measure_frontier(
        elastic_tiny, FrontierOptions(text=str(text_file), tokens=256, length=32, rules=("product", "pattern"))
    )


def test_the_rule_made_for_gate_scores_ranks_by_the_predictor_where_there_are_no_gate_neurons(tiny_frontier, elastic_tiny):
    assert {p.point.slots.scorer for p in tiny_frontier.points if p.rule == "pattern"} == {"ridge"}
    model = moe_prism.load(elastic_tiny)[0]
    with pytest.raises(UsageError, match="gate neurons"), moe_prism.operating_point(model, 0.5, rule="pattern"):
        pass


def test_frontier_json_has_the_agreed_keys(tiny_frontier, tmp_path):
    tiny_frontier.save(tmp_path / "frontier.json")
    data = json.loads((tmp_path / "frontier.json").read_text())
    assert set(data) == FRONTIER_KEYS
    assert data["points"] and data["baseline_topk"]
    assert all(set(point) == POINT_KEYS for point in data["points"] + data["baseline_topk"])
    assert Frontier.load(tmp_path / "frontier.json").to_json() == data == json.loads(json.dumps(tiny_frontier.to_json()))


def test_every_number_of_slots_is_measured_and_costs_what_the_formula_says(tiny_frontier, elastic_tiny):
    model, _ = moe_prism.load(elastic_tiny)
    layers = [layer.parts.layer for layer in model._moe_prism.layers]
    k, n_sub = model.config.num_experts_per_tok, tiny_frontier.n_sub
    product = [p for p in tiny_frontier.points if p.rule == "product"]
    assert [p.k_slots for p in product] == [float(c) for c in range(min(k, n_sub - 1), k * n_sub + 1)]
    full = sum(layer.parameters_per_expert() for layer in layers) * k
    for point in (p for p in tiny_frontier.points if p.budget == 1):
        assert point.active_expert_params == full and point.flops_per_token == 2 * full
        assert point.active_expert_bytes == 4 * full  # the tiny checkpoint is float32
        assert point.kl < 1e-9 and point.top1_agreement == 1
    plain = {p.name: p for p in tiny_frontier.baseline_topk}
    assert set(plain) == {f"top-{fewer}" for fewer in range(1, k)}
    assert all(p.active_expert_params == full * int(name[4:]) / k for name, p in plain.items())
    costs = [p.active_expert_params for p in product[:-1]]
    assert costs == sorted(costs)


def test_evaluation_text_is_not_calibration_text(elastic_tiny, tiny_frontier, text_file):
    options = read_manifest(elastic_tiny)["options"]["calibration"]
    assert options["text"] == str(text_file)  # one file for both: cut in two, so that the sides share nothing
    assert tiny_frontier.provenance["evaluation"]["tokens"] == 256
    assert "documents" not in tiny_frontier.provenance["calibration"]

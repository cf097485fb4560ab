"""The replay that stands for the store, and the forecast on top of it."""

from __future__ import annotations

import json

import pytest
import torch

from moe_prism.cli import main
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point
from moe_prism.errors import UsageError
from moe_prism.jobs.forecast_offload import Way, choose_way, forecast_offload
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.replay import groups, serve
from moe_prism.options.offload import OffloadOptions
from moe_prism.store.pools import Eviction, pools
from moe_prism.store.price_reads import ReadPrices, at_budget, measure_step, replayed
from tests.store.common import opened, smallest, store_of

LENGTH, PROMPT = 24, 8
POLICIES = [n for n in cache_policies.names() if n not in ("static", "hobbit", "sch", "belady")]


@pytest.fixture(scope="module")
def text(elastic_tiny, text_file, tmp_path_factory):
    """(model with everything resident, ids [2, 24], packed file)"""
    file = tmp_path_factory.mktemp("store") / "p"
    whole, tokenizer = opened(elastic_tiny, file)
    return whole, token_windows(tokenizer, str(text_file), "evaluation", length=LENGTH, tokens=2 * LENGTH).ids[:2], file


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_the_replay_misses_what_the_store_misses(elastic_tiny, text, policy, budget):
    """Loads of the decode steps, in the order and with the cache of the run: equal, not close."""
    whole, ids, file = text
    stored, _ = opened(elastic_tiny, file, smallest(whole, 18), policy=policy)
    with operating_point(whole, budget):
        trace = record(TraceRecorder(whole), [("evaluation", ids)], prompt=1)
    store = store_of(stored)
    with torch.no_grad(), operating_point(stored, budget):
        for row in ids:
            past = None
            for i in range(LENGTH):
                past = stored(input_ids=row[None, i : i + 1], past_key_values=past, use_cache=True).past_key_values
    cache = pools(Eviction(cache_policies.get(policy), group=store.group), store.space, store.slots)
    for group in groups(trace, store.space):
        serve(cache, group, store.space.layers)
    assert cache.counts == store.cache.counts


def test_a_forecast_is_the_step_plus_the_prices_of_its_misses(text):
    whole, ids, _ = text
    with operating_point(whole):
        trace = record(TraceRecorder(whole), [("evaluation", ids)], prompt=PROMPT)
    space = store_of(whole).space
    free = replayed(trace, space, len(space), Eviction(cache_policies.get("lru"), group=trace.k * space.parts)).at(
        ReadPrices([1, 2], [0.0, 0.0]), 0.5
    )
    assert free.seconds == 0.5
    dear = replayed(trace, space, 8, Eviction(cache_policies.get("lru"), group=trace.k * space.parts)).at(
        ReadPrices([1, 2], [1.0, 2.0]), 0.5
    )
    assert dear.seconds == pytest.approx(0.5 + dear.reads)


def test_prices_between_and_beyond_what_was_measured():
    prices = ReadPrices([1, 4], [1.0, 2.5])
    assert [prices.of(n) for n in (0, 1, 2, 4, 6)] == [0.0, 1.0, 1.5, 2.5, 3.5]
    slow = prices.over(1.5)
    assert [slow.of(n) for n in (1, 2, 4)] == [1.5, 3.0, 6.0]
    assert prices.over(0.1) == prices


def test_a_step_apart_from_its_reads_is_what_its_misses_leave_of_it(elastic_tiny, text):
    """With free reads the whole of it; with reads that cost more than everything, nothing."""
    whole, ids, file = text
    stored, _ = opened(elastic_tiny, file, smallest(whole, 8))
    free, dear = (measure_step(stored, ids, PROMPT, ReadPrices([1, 2], [c, 2 * c])) for c in (0.0, 1e9))
    assert free > 0 and dear == 0
    assert measure_step(whole, ids, PROMPT, ReadPrices([1], [1e9])) > 0  # nothing is missing here


def test_slots_at_a_budget_are_those_of_the_rule(text):
    whole, ids, _ = text
    with operating_point(whole):
        trace = record(TraceRecorder(whole, values=True), [("evaluation", ids)], prompt=PROMPT)
    counts = [at_budget(trace, whole._moe_prism, b).slots().mean() for b in (0.5, 0.75, 0.9)]  # choosing alone reads .44
    assert counts == sorted(counts)
    total = trace.k * trace.n_sub
    assert abs(counts[1] - 0.5 * total) < 0.2 * total


def test_the_largest_budget_within_the_target_is_chosen():
    ways = [Way(1.0, 8, "lru", p, 0.5, 4, ms) for p, ms in (("exact", 9.0), ("int8", 6.0))]
    ways += [Way(0.5, 4, policy, "exact", 0.5, 2, ms) for policy, ms in (("lru", 5.0), ("lfu", 4.0))]
    assert choose_way(ways, None) == (ways[0], True)
    assert choose_way(ways, 7.0) == (ways[1], True)
    assert choose_way(ways, 5.5) == (ways[3], True)
    assert choose_way(ways, 1.0) == (ways[3], False)


def test_plan_of_a_tiny_model(elastic_tiny, text):
    whole, _, file = text
    plan = forecast_offload(elastic_tiny, smallest(whole, 12), OffloadOptions(expert_file=file, tokens=160, budgets=(1.0, 0.5)))
    assert plan.slots == 12
    assert [(w.budget, w.policy) for w in plan.ways] == [(b, p) for b in (1.0, 0.5) for p in POLICIES]
    assert plan.ways[len(POLICIES)].reads_per_token < plan.ways[0].reads_per_token
    slow = forecast_offload(
        elastic_tiny, smallest(whole, 12), OffloadOptions(link="1000", expert_file=file, tokens=160, budgets=(1.0,))
    )
    assert slow.bytes_per_second <= 1e3
    assert slow.ways[0].ms_per_token > 1e3 * slow.ways[0].reads_per_token * slow.record_bytes / 1e3 / 2
    for wrong in ({"target_ms": 0.0}, {"link": "0"}):
        with pytest.raises(UsageError, match=r"out of range|too small|no amount of bytes per second"):
            forecast_offload(elastic_tiny, 1 << 20, OffloadOptions(expert_file=file, **wrong))


@pytest.mark.slow
def test_whole_experts_by_every_command(elastic_tiny, text, capsys, tmp_path):
    whole, _, file = text
    n = whole._moe_prism.layers[0].parts.n_sub
    memory, own = str(smallest(whole, 12)), ["--expert-file", str(tmp_path / "whole"), "--expert-parts", "1"]
    assert main(["offload", str(elastic_tiny), "--memory", memory, *own, "--tokens", "160"]) == 0
    shown = capsys.readouterr().out
    assert "--expert-parts 1" in shown
    base = [
        "generate",
        str(elastic_tiny),
        "--prompt",
        "import os",
        "--max-tokens",
        "4",
        "--expert-memory",
        memory,
    ]
    assert main([*base, *own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert main([*base, "--expert-file", str(file), "--expert-parts", str(n), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == found
    assert main([*base, "--expert-file", str(tmp_path / "none"), "--expert-parts", str(n + 1)]) == 2
    assert f"give 1, or {n}" in capsys.readouterr().err


def test_commands(elastic_tiny, text, capsys):
    whole, _, file = text
    memory = str(smallest(whole, 12))
    assert main(["offload", str(elastic_tiny), "--memory", memory, "--expert-file", str(file), "--tokens", "160", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slots"] == 12
    base = ["generate", str(elastic_tiny), "--prompt", "import os", "--max-tokens", "4", "--expert-file", str(file), "--json"]
    assert main([*base, "--expert-memory", memory]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert main([*base, "--expert-memory", memory, "--expert-policy", "lfu", "--expert-ahead", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == found
    assert main([*base, "--expert-memory", "10B"]) == 3
    assert "give at least" in capsys.readouterr().err
    assert main(base) == 2
    assert "--expert-file is of no use alone" in capsys.readouterr().err
    for policy, reason in (("belady", "knows the future"), ("static", "is fitted on a trace"), ("lrv", "did you mean")):
        assert main([*base, "--expert-memory", memory, "--expert-policy", policy]) == 2
        assert reason in capsys.readouterr().err

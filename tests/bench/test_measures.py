"""The arithmetic of the metrics, against brute force."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.bench.load import LoadRun
from moe_prism.bench.measures import Lateness, Window, measure, percentiles, stalls
from moe_prism.bench.outcome import FAILED, REFUSED, UNFINISHED
from moe_prism.bench.result import below_floor, run_result
from moe_prism.bench.saturation import saturated
from moe_prism.bench.target import PLAIN
from tests.bench.common import outcome
from tests.schedule.common import LADDER

times = st.floats(1e-4, 10, allow_nan=False)


def brute_quantile(values, q):
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below, above = math.floor(place), math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@given(st.lists(times, min_size=1, max_size=60))
def test_percentiles_are_those_of_raw_values(values):
    found = percentiles([*values, None])
    assert found["n"] == len(values)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] == pytest.approx(brute_quantile(values, q))
    assert not found["enough"] and percentiles([0.1] * 1000)["enough"]


def test_nothing_measured_is_none_and_not_zero():
    assert percentiles([])["p99"] is None
    found = measure([outcome(due=1.0)], Window(5, 6))
    assert found["offered"] == 0 and found["attainment"] is None and found["ttft"]["p50"] is None and found["quality"] is None


def test_latencies_of_one_request():
    o = outcome(due=2.0, sent=2.5, first=0.3, gap=0.05, tokens=4)
    assert o.ttft == pytest.approx(0.3) and o.tpot == pytest.approx(0.05) and o.e2e == pytest.approx(0.45)
    assert o.late == pytest.approx(0.5) and o.gaps == pytest.approx([0.05] * 3)


def test_time_per_token_counts_tokens_and_not_events():
    o = outcome(first=0.1, gap=0.1, tokens=3)
    o.tokens = 5  # two events carried two tokens each
    assert o.tpot == pytest.approx(0.2 / 4)
    assert outcome(tokens=1).tpot is None and outcome(tokens=1).met


@given(
    st.lists(
        st.tuples(
            times, times, st.integers(1, 6), st.sampled_from(["ok", REFUSED, FAILED, UNFINISHED]), st.sampled_from("ab"), times
        ),
        min_size=1,
        max_size=30,
    )
)
def test_goodput_and_attainment_against_brute_force(rows):
    window = Window(2.0, 8.0)
    made = [outcome(due, first, 0.1, n, ttft=1.0, tpot=0.15, kind=kind, status=status) for first, _, n, status, kind, due in rows]
    for o, (_, gap, n, *_rest) in zip(made, rows, strict=True):
        o.events = [o.events[0] + i * gap for i in range(n)]
    found = measure(made, window)
    inside = [(r, o) for r, o in zip(rows, made, strict=True) if 2 <= r[5] < 8]
    good = sum(r[3] == "ok" and r[0] <= 1.0 + 1e-6 and (r[2] == 1 or r[1] <= 0.15 + 1e-6) for r, _ in inside)
    assert found["offered"] == len(inside) and found["met"] == good
    assert found["goodput"] == pytest.approx(good / 6)
    assert found["attainment"] == (pytest.approx(good / len(inside)) if inside else None)
    assert sum(c["met"] for c in found["classes"].values()) == good
    assert sum(found["outcomes"].values()) == len(inside), "failures are counted, not left out"
    tokens = sum(o.tokens * sum(2 <= t < 8 for t in o.events) / len(o.events) for o in made)
    assert found["output_tokens_per_second"] == pytest.approx(tokens / 6)


def test_quality_is_a_mean_over_tokens():
    made = [outcome(1, quality=0.8, computed=30), outcome(1, quality=1.0, computed=10), outcome(1)]
    assert measure(made, Window(0, 2))["quality"] == pytest.approx(0.85)


def test_stalls():
    assert stalls([0.1] * 9 + [0.6]) == 1 and stalls([0.1] * 9 + [0.5]) == 0 and stalls([]) == 0


def test_run_is_void_if_the_generator_was_late():
    late = [outcome(due=i / 10, sent=i / 10 + 0.01) for i in range(100)]
    assert Lateness.of(late, 10.0).void, "10 ms against 5 ms"
    assert not Lateness.of(late, 100.0).void, "2 % of a mean gap of a second are 20 ms"
    one = [outcome(due=i / 100) for i in range(999)] + [outcome(due=9.99, sent=10.5)]
    assert not Lateness.of(one, 10.0).void and Lateness.of(one, 10.0).most == pytest.approx(0.51)
    assert run_result(LoadRun(late, 10.0), PLAIN)["void"] and not run_result(LoadRun(one, 10.0), PLAIN)["void"]


def test_result_warns_of_short_answers_and_of_floors():
    o = outcome(due=5.0, quality=0.5, computed=10)
    o.length, o.job = 9, outcome().job.__class__("r", 5.0, 10, 9, floor=1)
    assert below_floor(o, LADDER)
    found = run_result(LoadRun([o, outcome(due=6.0)], 10.0), LADDER)
    assert found["short_answers"] == 1 and found["below_floor"] == 1 and len(found["warnings"]) == 2


def queue_run(load, seed, seconds=60.0, rate=10.0):
    """Poisson arrivals at one server with equal service times: queue and first token, by Lindley's recursion."""
    rng = random.Random(seed)
    due, free, made = 0.0, 0.0, []
    service = load / rate
    while (due := due + rng.expovariate(rate)) < seconds:
        free = max(free, due) + service
        made.append(outcome(due, first=free - due, tokens=1))
    return made


def test_saturation_is_seen_at_1_2_and_not_at_0_8_of_capacity():
    window = Window.steady(60.0)
    assert sum(saturated(queue_run(0.8, seed), window) for seed in range(20)) == 0
    assert all(saturated(queue_run(1.2, seed), window) for seed in range(20))


def test_saturation_of_a_server_that_answers_nothing():
    made = deque(outcome(i / 10, tokens=0, status=UNFINISHED) for i in range(600))
    assert not saturated(list(made)[:5], Window.steady(60.0)), "too few to tell"
    for o in made:
        o.end = None
    assert not saturated(list(made), Window.steady(60.0)) or all(o.ttft is None for o in made)

import json
from dataclasses import replace

import numpy as np
import pytest

from moe_prism.errors import UsageError
from moe_prism.schedule import Job, Policy, Work, policies
from moe_prism.schedule.classes import default_classes
from moe_prism.schedule.simulate import SimulatedEngine, simulate
from moe_prism.schedule.summary import by_class, summarise, window
from moe_prism.schedule.workloads import TIMES, Arrival, generate, read_trace, write_trace

from .common import LADDER, cost, policy


def arrivals(name: str = "chat", rate: float = 8.0, duration: float = 20.0, seed: int = 0, **options) -> list[Arrival]:
    return generate(name, rate, duration, default_classes(), LADDER, seed, **options)


# -- workloads


@pytest.mark.parametrize("name", TIMES)
def test_same_seed_same_bytes_other_seed_other_arrivals(name, tmp_path):
    for i, seed in enumerate((1, 1, 2)):
        write_trace(tmp_path / f"{i}.jsonl", arrivals(name, seed=seed), LADDER)
    one, same, other = ((tmp_path / f"{i}.jsonl").read_bytes() for i in range(3))
    assert one == same != other


@pytest.mark.parametrize("name", TIMES)
def test_rates_and_classes_are_as_asked(name):
    found = arrivals(name, rate=50.0, duration=200.0)
    assert len(found) == pytest.approx(10_000, rel=0.1)
    kinds = [a.job.kind for a in found]
    assert kinds.count("standard") / len(kinds) == pytest.approx(0.5, abs=0.02)
    times = [a.job.arrival for a in found]
    assert times == sorted(times)
    assert all(1 <= a.length <= a.job.output for a in found)


def test_bursts_are_burstier_and_the_day_has_a_step():
    def spread(name):
        counts = np.histogram([a.job.arrival for a in arrivals(name, 20.0, 200.0)], 200, (0, 200))[0]
        return counts.var() / counts.mean()

    assert spread("chat") == pytest.approx(1.0, abs=0.3)
    assert spread("burst") > 2
    day = np.array([a.job.arrival for a in arrivals("classes", 50.0, 200.0)])
    before, step = ((day >= 80) & (day < 90)).sum(), ((day >= 90) & (day < 100)).sum()
    assert step / before == pytest.approx(3.0, rel=0.15)


def test_floors_can_be_drawn_for_each_request():
    floors = [a.job.floor for a in arrivals(rate=50.0, spread=0.3)]
    assert set(floors) == set(range(len(LADDER)))


def test_traces_come_back_as_they_went(tmp_path):
    sent = arrivals()
    write_trace(tmp_path / "t.jsonl", sent, LADDER)
    assert [line.of(default_classes(), LADDER) for line in read_trace(tmp_path / "t.jsonl")] == sent


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        json.dumps({"arrival": 0, "class": "batch", "prompt": 1}),
        json.dumps({"arrival": 0, "class": "none", "prompt": 1, "output": 1}),
        json.dumps({"arrival": -1, "class": "batch", "prompt": 1, "output": 1}),
        json.dumps({"arrival": 0, "class": "batch", "prompt": 1, "output": 1, "length": 2}),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path, line):
    good = json.dumps({"arrival": 0, "class": "batch", "prompt": 1, "output": 1})
    (tmp_path / "t.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UsageError, match=r"t\.jsonl:2"):
        [line.of(default_classes(), LADDER) for line in read_trace(tmp_path / "t.jsonl")]


def test_unknown_workloads_and_impossible_rates():
    with pytest.raises(UsageError, match="chat, burst"):
        arrivals("none")
    with pytest.raises(UsageError):
        arrivals(rate=0.0)
    with pytest.raises(UsageError, match="no class"):
        arrivals(mix={"gold": 1.0})


# -- the simulator


def test_one_request_by_hand():
    model = cost()
    job = Job("a", 1.0, 100, 3, floor=1, ttft=1.0, tpot=1.0)
    run = simulate([Arrival(job, 3)], policy("fifo"), model, LADDER, SimulatedEngine(tokens=60))
    slots = LADDER.levels[1].slots
    first = model.prefill(60, slots) + model.prefill(40, slots, computed=60)
    rest = model.decode(1, slots, 101) + model.decode(1, slots, 102)
    (result,) = run.results
    assert result.ttft == pytest.approx(first)
    assert result.tpot == pytest.approx(rest / 2)
    assert result.e2e == pytest.approx(first + rest)
    assert (result.tokens, result.quality) == (102, pytest.approx(0.9))
    assert result.met
    assert len(run.steps) == 4


@pytest.mark.parametrize("name", policies.names())
def test_same_seed_same_run_and_everyone_is_served(name):
    def replay():
        model = cost()
        return simulate(
            arrivals("burst"),
            policy(name, model),
            cost(),
            LADDER,
            SimulatedEngine(16, 256, 8192),
            noise=0.1,
            seed=3,
            believed=model,
        )

    one, same = replay(), replay()
    assert one.steps == same.steps
    assert one.results == same.results
    assert all(r.end is not None for r in one.results)
    assert sum(r.tokens for r in one.results) == sum(r.job.prompt + r.length - 1 for r in one.results)
    for r in one.results:
        assert r.quality >= LADDER.levels[r.job.floor].quality - 1e-9


def test_refusals_and_the_unfinished_count_as_missed():
    run = simulate(arrivals(rate=60.0), policy("fifo"), cost(), LADDER, SimulatedEngine(queue=5), until=20.0)
    total = summarise(run.results, 20.0)
    refused = [r for r in run.results if r.refused]
    assert refused
    assert total.offered == len(run.results) > total.finished >= total.met
    assert sum(summarise(r, 20.0).offered for r in by_class(run.results).values()) == total.offered
    assert len(window(run, 5.0, 10.0)) == sum(5.0 <= r.job.arrival < 10.0 for r in run.results)
    assert np.isnan(summarise([], 1.0).quality)


class Broken(Policy):
    """Answers what it is told."""

    def __init__(self, works):
        self.works = works

    def step(self, now, waiting, running, limits):
        return self.works


@pytest.mark.parametrize(
    "works",
    [
        [Work("a", 1, 0)],  # below the floor
        [Work("a", 1, 3)],  # above the ceiling
        [Work("a", 101, 1)],  # more than the prompt
        [Work("a", 0, 1)],
        [Work("a", 1, 1), Work("a", 1, 1)],
        [Work("b", 1, 1)],
        [],
    ],
)
def test_a_policy_that_breaks_the_contract_is_caught(works):
    job = Job("a", 0.0, 100, 3, floor=1, ceiling=2)
    with pytest.raises(RuntimeError):
        simulate([Arrival(job, 3)], Broken(works), cost(), LADDER)
    with pytest.raises(RuntimeError):
        simulate(
            [Arrival(job, 3), Arrival(replace(job, id="c"), 3)],
            Broken([Work("a", 1, 1), Work("c", 1, 1)]),
            cost(),
            LADDER,
            SimulatedEngine(1),
        )

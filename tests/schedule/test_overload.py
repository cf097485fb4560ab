"""Long simulated runs: nobody starves, deadlines of the high class hold, memory stays bounded (reliability S07 to S09)."""

from dataclasses import replace

import pytest

from moe_prism.forecast.step_cost import Coefficients
from moe_prism.schedule import CostModel, policies
from moe_prism.schedule.classes import default_classes
from moe_prism.schedule.simulate import SimulatedEngine, simulate
from moe_prism.schedule.summary import by_class, summarise, window
from moe_prism.schedule.workloads import Arrival, generate

from .common import FACTS, LADDER, cost, policy

SLOWER = 8.0  # than `common.cost`, with targets to match: fewer steps in ten minutes
ENGINE = SimulatedEngine(requests=32, tokens=512, cache=1 << 15, queue=128)
CLASSES = {name: c.slower(SLOWER) for name, c in default_classes().items()}
CAPACITY = 1.5  # requests/s that this engine can take at the floors, about
MINUTES = 600.0


def slow() -> CostModel:
    c = cost().coefficients
    return CostModel(FACTS, Coefficients(*(SLOWER * seconds for seconds in vars(c).values())))


def arrivals(rate: float, duration: float, mix=None, seed: int = 0) -> list[Arrival]:
    return generate("chat", rate, duration, CLASSES, LADDER, seed, mix=mix)


def replay(name: str, rate: float, duration: float, mix=None, seed: int = 0):
    model = slow()
    return simulate(
        arrivals(rate, duration, mix, seed),
        policy(name, model),
        slow(),
        LADDER,
        ENGINE,
        until=duration,
        noise=0.05,
        believed=model,
    )


@pytest.fixture(scope="module")
def overload():
    """Ten minutes at three times what can be served."""
    return replay("elastic", 3 * CAPACITY, MINUTES)


def test_s09_every_class_gets_at_least_five_percent_at_three_times_the_load(overload):
    classes = by_class(overload.results)
    total = sum(r.tokens for r in overload.results)
    for kind, results in classes.items():
        assert sum(r.tokens for r in results) / total >= 0.05, kind
        ended = [r for r in results if r.end is not None]
        assert len(ended) / len(results) >= 0.05, kind


def test_s07_goodput_under_overload_stays_near_its_peak(overload):
    """S07."""
    peak = max(summarise(replay("elastic", CAPACITY * x, 200.0).results, 200.0).goodput for x in (0.9, 1.1))
    assert summarise(overload.results, MINUTES).goodput >= 0.9 * peak


def test_s09_the_high_class_meets_its_targets_while_the_low_one_overloads():
    """S09: interactive at 0.3 of the capacity, batch at 10 times the capacity, ten minutes."""
    run = replay("elastic", 10.3 * CAPACITY, MINUTES, mix={"interactive": 0.3, "batch": 10.0})
    classes = by_class(run.results)
    ended = by_class(window(run, 0.0, MINUTES - 40.0))["interactive"]  # later ones are cut off by the end of the run
    assert summarise(ended, MINUTES).attainment >= 0.99
    assert sum(r.tokens for r in classes["batch"]) / sum(r.tokens for r in run.results) >= 0.05


def test_s08_quality_comes_back_after_a_burst():
    """S08: three times the load for 60 s, then a light one: quality is full again soon after the backlog is gone."""
    model = slow()
    only = {"interactive": 1.0}
    heavy = arrivals(3 * CAPACITY, 60.0, only, seed=1)
    light = [replace(a, job=replace(a.job, id=f"l{a.job.id}")) for a in arrivals(0.3 * CAPACITY, 240.0, only, seed=2)]
    run = simulate(
        [*heavy, *(a for a in light if a.job.arrival > 60.0)], policy("elastic", model), slow(), LADDER, ENGINE, believed=model
    )
    drained = next(s.start for s in run.steps if s.start > 60.0 and s.waiting == 0)
    assert drained < 200.0
    after = [s for s in run.steps if s.start > drained + 10.0]
    assert sum(s.quality * s.seconds for s in after) / sum(s.seconds for s in after) >= 0.995


@pytest.mark.parametrize("name", [n for n in policies.names() if n != "full-batch"])
def test_wait_is_bounded_when_the_load_can_be_served(name):
    run = replay(name, 0.5 * CAPACITY, 120.0)
    waits = [r.admitted - r.job.arrival for r in run.results if r.admitted is not None]
    assert max(waits) < 12.0
    assert sum(r.admitted is None for r in run.results) <= 2  # those that have just arrived


def test_s09_a_steady_stream_of_urgent_requests_starves_nobody():
    """Interactive requests alone overload the server; ten batch requests and ten that are hopelessly late are there from the start."""
    stream = arrivals(2.5 * CAPACITY, 300.0, {"interactive": 1.0}, seed=3)
    batch = [Arrival(CLASSES["batch"].job(f"b{i}", 0.0, 100, 20, LADDER), 20) for i in range(10)]
    late = [Arrival(CLASSES["standard"].slower(0.001).job(f"s{i}", 0.0, 100, 20, LADDER), 20) for i in range(10)]
    run = simulate([*batch, *late, *stream], policy("elastic"), slow(), LADDER, ENGINE, until=300.0)
    for result in run.results:
        if result.job.id[0] in "bs":
            assert result.end is not None, result.job.id
            assert result.e2e < 200.0

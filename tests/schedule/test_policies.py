"""Spec 8.2: what every policy keeps, and the paper's scheduler against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.schedule import Job, Limits, Progress, Work, policies

from .common import LADDER, check, cost, policy, runs, waits

NAMES = policies.names()
MIXED = [(name, {"mixed": True}) for name in NAMES if name != "elastic"]
ALL = [*((name, {}) for name in NAMES), *MIXED, ("prism", {"regroup": False}), ("elastic", {"quality": 0.95})]


@st.composite
def instances(draw, most: int = 6):
    """Waiting requests in order of arrival, running ones in prefill or decode, limits, and the time."""
    now = 10.0
    progress = []
    for i in range(draw(st.integers(0, most))):
        floor = draw(st.integers(0, LADDER.top))
        job = Job(
            f"r{i}",
            draw(st.floats(0, now)),
            draw(st.integers(1, 60)),
            draw(st.integers(1, 40)),
            floor,
            draw(st.sampled_from([-1, *range(floor, LADDER.top + 1)])),
            draw(st.sampled_from([None, 0.2, 2.0])),
            draw(st.sampled_from([None, 0.01, 0.2])),
            draw(st.integers(0, 2)),
            draw(st.sampled_from(["a", "b"])),
        )
        state = draw(st.sampled_from(["waits", "prefill", "decode"]))
        if state == "waits":
            progress.append(Progress(job))
        elif state == "prefill":
            progress.append(Progress(job, draw(st.integers(0, job.prompt - 1)), 0, None, floor))
        else:
            progress.append(Progress(job, job.prompt, draw(st.integers(1, job.output)), draw(st.floats(job.arrival, now)), floor))
    waiting = sorted((p for p in progress if p.level is None), key=lambda p: p.job.arrival)
    running = [p for p in progress if p.level is not None]
    limits = Limits(
        max(len(running), 1) + draw(st.integers(0, 4)), max(len(running), 1) + draw(st.integers(0, 80)), draw(st.integers(0, 300))
    )
    return now, waiting, running, limits


@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda value: str(value))
@settings(max_examples=60, deadline=None)
@given(instance=instances())
def test_every_answer_keeps_floors_ceilings_and_limits_and_wastes_no_step(name, options, instance):
    now, waiting, running, limits = instance
    chosen = policy(name, **options)
    works = chosen.step(now, waiting, running, limits)
    check(works, waiting, running, limits)
    fits = [p for p in waiting if len(running) < limits.requests and p.job.prompt + p.job.output <= limits.free_cache]
    if running or len(fits) == len(waiting) > 0:
        assert works or chosen.wake(now) is not None
    assert works == policy(name, **options).step(now, waiting, running, limits), "the same calls, the same answers"


@pytest.mark.parametrize("name", ["fifo", "edf", "full-batch"])
def test_the_whole_batch_runs_at_its_highest_floor(name):
    running = [runs("a", floor=0), runs("b", floor=3), runs("c", floor=1, ceiling=2)]
    works = policy(name).step(1.0, [], running, Limits())
    assert works == [Work("a", 1, 3), Work("b", 1, 3), Work("c", 1, 2)]
    mixed = policy(name, mixed=True).step(1.0, [], running, Limits())
    assert [work.level for work in mixed] == [0, 3, 1]


def test_fifo_admits_in_order_and_nobody_passes():
    waiting = [waits("a", 0.0), waits("b", 1.0, prompt=900), waits("c", 2.0)]
    works = policy("fifo").step(3.0, waiting, [], Limits(free_cache=500))
    assert [work.id for work in works] == ["a"]
    works = policy("fifo").step(3.0, waiting, [], Limits(tokens=100))
    assert [(work.id, work.tokens) for work in works] == [("a", 50), ("b", 50)]


def test_full_batch_waits_for_its_size_or_its_time():
    chosen = policy("full-batch", size=3, timeout=2.0)
    waiting = [waits("a", 0.0), waits("b", 0.5)]
    assert chosen.step(1.0, waiting, [], Limits()) == []
    assert chosen.wake(1.0) == 2.0
    assert len(chosen.step(2.0, waiting, [], Limits())) == 2
    assert chosen.wake(2.0) is None
    late = waits("c", 2.0)
    running = [runs("a"), runs("b")]
    assert {work.id for work in chosen.step(3.0, [late], running, Limits())} == {"a", "b"}, "nobody joins a batch that runs"
    assert len(policy("full-batch", size=3).step(0.0, [*waiting, late], [], Limits())) == 3


def test_edf_serves_the_late_first_and_gates_what_would_raise_the_batch():
    waiting = [waits("calm", 0.0, ttft=9.0, floor=1), waits("late", 1.0, ttft=0.1, floor=2)]
    assert policy("edf").step(3.0, waiting, [], Limits(tokens=60))[0].id == "late"
    running = [runs("r", floor=1)]
    high = [waits("high", 0.0, ttft=9.0, floor=3)]
    assert [work.id for work in policy("edf").step(1.0, high, running, Limits())] == ["r"]
    assert len(policy("edf").step(8.0, high, running, Limits())) == 2, "little slack opens the gate"
    endless = [waits("high", 0.0, floor=3)]
    assert len(policy("edf", patience=5.0).step(4.0, endless, running, Limits())) == 2, "no target does not mean never"


# -- the paper


def utility(level: int, batch: list[Progress], model) -> float:
    """tokens / C(batch, level), written out."""
    tokens, slots, pairs = 0, 0.0, [0.0, 0.0]
    for p in batch:
        tokens += p.job.prompt
        slots += p.job.prompt * LADDER.levels[level].slots
        pairs[0] += p.job.prompt * (p.job.prompt + 1) / 2
    c = model.coefficients
    seconds = c.step + c.prefill_token * tokens + c.prefill_slot * slots + c.prefill_pair * pairs[0]
    return tokens / seconds


@settings(max_examples=150, deadline=None)
@given(
    floors=st.lists(st.integers(0, LADDER.top), min_size=1, max_size=6),
    prompts=st.lists(st.integers(1, 80), min_size=6, max_size=6),
    places=st.integers(1, 6),
    slope=st.sampled_from([0.3, 0.6, 0.95]),
    step=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_prism_starts_the_queue_of_highest_utility(floors, prompts, places, slope, step):
    model = cost(slope, step)
    waiting = [waits(f"r{i}", 0.01 * i, prompt=prompts[i], floor=floor) for i, floor in enumerate(floors)]
    works = policy("prism", model, timeout=100.0).step(1.0, waiting, [], Limits(requests=places))
    queues = {m: [p for p in waiting if p.job.floor <= m][:places] for m in sorted(set(floors))}
    full = {m: batch for m, batch in queues.items() if len(batch) == places}
    best = max((full or queues).items(), key=lambda item: (round(utility(item[0], item[1], model), 6), -item[0]))
    assert {work.level for work in works} == {best[0]}
    assert {work.id for work in works} == {p.job.id for p in best[1]}


def test_the_papers_example_a_low_floor_is_lifted_when_the_larger_batch_wins():
    waiting = [waits("low", 0.0, floor=0), *(waits(f"high{i}", 0.01, floor=3) for i in range(3))]
    lifted = policy("prism", cost(step=0.05), timeout=9.0).step(0.1, waiting, [], Limits())
    assert [(work.id, work.level) for work in lifted] == [("low", 3), ("high0", 3), ("high1", 3), ("high2", 3)]
    alone = policy("prism", cost(slope=0.26, step=0.0), timeout=9.0).step(0.1, waiting, [], Limits())
    assert [(work.id, work.level) for work in alone] == [("low", 0)]
    bounded = policy("prism", cost(step=0.05), timeout=9.0, upgrade=1).step(0.1, waiting, [], Limits())
    assert "low" not in {work.id for work in bounded}


def test_prism_starts_who_has_waited_too_long_whatever_the_utility():
    model = cost(slope=0.26, step=0.0)
    waiting = [waits("high", 0.0, floor=3), *(waits(f"low{i}", 0.9, floor=0) for i in range(5))]
    assert "high" not in {work.id for work in policy("prism", model, timeout=2.0).step(1.0, waiting, [], Limits())}
    works = policy("prism", model, timeout=0.5).step(1.0, waiting, [], Limits(requests=3))
    assert works[0].id == "high"
    assert {work.level for work in works} == {3}


def test_prism_regroups_what_runs_and_pauses_nobody_beyond_the_timeout():
    model, running = cost(slope=0.26, step=0.0), [runs("low", floor=0), runs("high", floor=3)]
    chosen = policy("prism", model, timeout=0.5)
    first = chosen.step(1.0, [], running, Limits())
    assert [work.id for work in first] == ["low"]
    seen = [{work.id for work in chosen.step(1.0 + 0.1 * i, [], running, Limits())} for i in range(1, 20)]
    paused = [len(list(group)) for high, group in itertools.groupby("high" in ids for ids in seen[1:]) if not high]
    assert max(paused) <= 6
    kept = policy("prism", model, regroup=False).step(1.0, [], running, Limits())
    assert kept == [Work("low", 1, 3), Work("high", 1, 3)]


def test_names():
    with pytest.raises(UsageError, match="did you mean 'fifo'"):
        policies.get("fifi")

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.forecast.step_cost import Totals, chunk_pairs
from moe_prism.schedule import Job, Limits, Progress, Work
from moe_prism.schedule.backlog import Backlog
from moe_prism.schedule.elastic import MARGIN
from moe_prism.schedule.levels import LevelPrices, Parts, lift, worthwhile
from moe_prism.schedule.totals import step_totals

from .common import FACTS, LADDER, check, cost, policy, runs, waits

PRICES = LevelPrices(LADDER, FACTS)


def seconds(works, progress, model) -> float:
    known = {p.job.id: p for p in progress}
    return model.seconds(step_totals(model.facts, [(known[w.id], w) for w in works], LADDER))


# -- levels


@st.composite
def parts(draw):
    n, m = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    floor = np.array(draw(st.lists(st.integers(0, LADDER.top), min_size=n + m, max_size=n + m)), dtype=np.int64)
    ceiling = np.array([draw(st.integers(int(f), LADDER.top)) for f in floor], dtype=np.int64)
    tokens = np.array(draw(st.lists(st.integers(1, 40), min_size=m, max_size=m)), dtype=np.float64)

    def totals(levels):
        prompts = PRICES.prompts(tokens, levels[n:], float(sum(chunk_pairs(t, 0) for t in tokens)))
        return PRICES.decodes(levels[None, :n], 50.0 * n)[0] + prompts

    return Parts(floor, ceiling, tokens, totals(floor), totals(ceiling)), totals


@settings(max_examples=300, deadline=None)
@given(case=parts(), budget=st.floats(0, 0.1), block=st.sampled_from([0.0, 2e-4]))
def test_levels_equal_lifting_the_lowest_one_at_a_time(case, budget, block):
    columns, totals = case
    model = cost(block=block)
    if not len(columns.floor):
        return
    expected = columns.floor.copy()
    while True:
        may = [(int(expected[i]), i) for i in range(len(expected)) if expected[i] < columns.ceiling[i]]
        if not may:
            break
        trial = expected.copy()
        trial[min(may)[1]] += 1
        if model.base(totals(trial)) > budget:
            break
        expected = trial
    found = lift(columns, budget, model, PRICES)
    if not np.array_equal(found, expected):  # only where rounding decides
        assert model.base(totals(np.maximum(found, expected))) == pytest.approx(budget, rel=1e-9)


def test_on_a_concave_ladder_no_other_choice_of_equal_time_is_better():
    floor, top = np.zeros(4, dtype=np.int64), np.full(4, LADDER.top)
    model = cost()
    columns = Parts(floor, top, np.zeros(0), *PRICES.decodes(np.stack([floor, top]), 0.0))
    for budget in np.linspace(float(model.base(columns.floors)), float(model.base(columns.ceilings)), 9):
        best = max(
            sum(LADDER.levels[level].quality for level in levels)
            for levels in itertools.product(range(len(LADDER)), repeat=4)
            if model.base(PRICES.decodes(np.array([levels]), 0.0)[0]) <= budget + 1e-12
        )
        got = sum(LADDER.levels[level].quality for level in lift(columns, budget, model, PRICES))
        assert got >= best - 0.04  # one rung of one request: lifts are whole


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1.0), min_size=1, max_size=6), st.floats(0.0, 3.0))
def test_levels_worth_serving_are_those_down_to_the_first_that_costs_too_much_quality(shares, worth):
    seconds = np.sort(np.array([*shares, 1.0]))
    quality = np.linspace(0.8, 1.0, len(seconds))
    found = worthwhile(seconds, quality, worth)
    bought, paid = 1 - seconds / seconds[-1], 1 - quality / quality[-1]
    assert (bought >= worth * paid - 1e-9)[found:].all()
    assert found == 0 or bought[found - 1] < worth * paid[found - 1]
    assert worthwhile(seconds, quality, 0.0) == 0


# -- the step


def test_quality_is_not_thrown_after_time_that_it_does_not_buy():
    running = [runs(f"r{i}", generated=10, first=1.0, tpot=0.04) for i in range(45)]

    def levels(slope, **options):
        return {work.level for work in policy("elastic", cost(slope), **options).step(1.0 + 0.04 * 9, [], running, Limits())}

    assert levels(0.97) == {LADDER.top}  # 3 % of the time for 15 % of the quality
    assert min(levels(0.97, worth=0.0)) < LADDER.top
    assert min(levels(0.5)) < LADDER.top


def test_decodes_that_can_wait_make_room_for_an_urgent_prompt():
    tight = [runs(f"t{i}", generated=10, first=1.0, tpot=0.045, output=100) for i in range(10)]
    loose = [runs(f"l{i}", generated=10, first=1.0, output=100, priority=2) for i in range(40)]
    now = 1.0 + 0.045 * 9

    def step(*waiting):
        works = {work.id: work for work in policy("elastic").step(now, waiting, [*tight, *loose], Limits())}
        assert {p.job.id for p in tight} < set(works)
        return works

    everyone = {p.job.id for p in (*tight, *loose)}
    assert everyone <= set(step())
    assert everyone <= set(step(waits("calm", now, prompt=2000, priority=2))), "nobody waits for who has no target"
    works = step(waits("urgent", now, prompt=2000, ttft=0.45))
    assert not everyone <= set(works)
    assert works["urgent"].tokens * 0.45 / 0.045 >= 2000, "at this pace it is in time"


def test_among_the_late_the_longest_wait_in_units_of_the_target_goes_first():
    late = [
        waits("short", 8.0, prompt=300, ttft=0.5, kind="a"),
        waits("long", 2.0, prompt=300, ttft=5.0, kind="b", priority=1),
        waits("old", -90.0, prompt=300, kind="c", priority=2),
    ]
    order = []
    chosen = policy("elastic")
    while late:
        first = chosen.step(10.0, late, [], Limits(requests=1, tokens=300))[0].id
        order.append(first)
        late = [p for p in late if p.job.id != first]
    assert order == ["old", "short", "long"]


def test_full_quality_when_there_is_time():
    running = [runs(f"r{i}", tpot=0.2, first=0.0, generated=6) for i in range(8)]
    works = policy("elastic").step(1.0, [], running, Limits())
    assert [work.level for work in works] == [LADDER.top] * 8


def test_quality_is_shed_before_a_deadline_is_missed():
    model = cost()
    running = [runs(f"r{i}", generated=10, first=1.0, tpot=0.04) for i in range(40)]
    now = 1.0 + 0.04 * 9
    works = policy("elastic", model).step(now, [], running, Limits())
    assert len(works) == 40
    assert min(work.level for work in works) < LADDER.top
    assert seconds(works, running, model) <= 0.04
    assert seconds([Work(w.id, 1, LADDER.top) for w in works], running, model) > 0.04


def test_mixed_floors_and_ceilings_in_one_step():
    running = [runs("low", floor=0, ceiling=1), runs("high", floor=4), runs("any")]
    works = {work.id: work.level for work in policy("elastic").step(0.1, [], running, Limits())}
    assert works == {"low": 1, "high": 4, "any": 4}


def test_who_can_wait_is_left_out_when_even_the_floors_are_too_slow():
    model = cost()
    tight = [runs(f"t{i}", generated=10, first=1.0, tpot=0.02, output=100) for i in range(10)]
    loose = [runs(f"l{i}", generated=10, first=1.0) for i in range(60)]
    now = 1.0 + 0.02 * 9
    chosen = policy("elastic", model)
    works = chosen.step(now, [], [*loose, *tight], Limits())
    assert {p.job.id for p in tight} < {work.id for work in works}
    assert len(works) < 70
    assert seconds(works, [*loose, *tight], model) <= 0.02
    left = {p.job.id for p in loose} - {work.id for work in works}
    after = chosen.step(now + 2.0, [], [*loose, *(runs(f"t{i}", 100, 1.0, tpot=0.02, output=200) for i in range(10))], Limits())
    assert left & {work.id for work in after}, "those without a token for `stall` seconds go first"


def test_prompts_go_by_deadline_not_by_arrival():
    waiting = [waits("first", 0.0, prompt=400, ttft=9.0), waits("urgent", 0.1, prompt=400, ttft=1.0)]
    works = policy("elastic").step(0.2, waiting, [], Limits(tokens=128))
    assert works[0].id == "urgent"


def test_by_priority_when_not_all_can_be_met():
    late = [waits(f"a{i}", 0.0, prompt=500, ttft=0.4, priority=1, kind="a") for i in range(20)]
    waiting = [*late, waits("b", 0.0, prompt=100, ttft=0.8, priority=0, kind="b")]
    assert policy("elastic").step(0.0, waiting, [], Limits(tokens=512))[0].id == "b"


def test_who_is_too_late_goes_after_who_can_be_met():
    waiting = [waits("late", 0.0, prompt=300, ttft=0.5), waits("timely", 4.0, prompt=300, ttft=2.0)]
    works = policy("elastic").step(4.1, waiting, [], Limits(tokens=300))
    assert works[0].id == "timely"


def test_a_prompt_that_fits_no_cache_lets_nobody_pass():
    waiting = [waits("long", 0.0, prompt=900, ttft=1.0), waits("short", 0.1, prompt=10, ttft=5.0)]
    running = [runs("r")]
    works = policy("elastic").step(0.2, waiting, running, Limits(free_cache=500))
    assert [work.id for work in works] == ["r"]


def test_mean_quality_is_kept_at_least_at_what_was_asked():
    running = [runs(f"r{i}", generated=10, first=1.0, tpot=0.02, output=1000) for i in range(40)]
    chosen, served = policy("elastic", quality=0.94), []
    for _ in range(200):
        works = chosen.step(1.0 + 0.02 * 9, [], running, Limits())
        served += [LADDER.levels[work.level].quality for work in works]
    assert np.mean(served) >= 0.94 - 1e-3
    free = policy("elastic").step(1.0 + 0.02 * 9, [], running, Limits())
    assert np.mean([LADDER.levels[work.level].quality for work in free]) < 0.94


def test_cancelled_refused_and_unordered_requests_do_no_harm():
    chosen, limits = policy("elastic"), Limits(requests=2, tokens=64)
    waiting = [waits(f"w{i}", 0.1 * i, ttft=5.0) for i in range(6)]
    first = chosen.step(1.0, waiting, [], limits)
    check(first, waiting, [], limits)
    again = chosen.step(1.1, waiting, [], limits)  # the engine admitted nobody
    check(again, waiting, [], limits)
    assert again
    gone = [p for p in waiting if p.job.id not in {work.id for work in first}][1:]
    check(chosen.step(1.2, gone, [], limits), gone, [], limits)
    unordered = [*gone[::-1], waits("new", 0.0, ttft=5.0)]
    works = chosen.step(1.3, unordered, [], limits)
    check(works, unordered, [], limits)
    assert works
    assert chosen.step(1.4, [], [], limits) == []


def test_a_learnt_correction_shortens_what_is_planned():
    model = cost()
    running = [runs(f"r{i}", generated=10, first=1.0, tpot=0.04, output=1000) for i in range(25)]
    now = 1.0 + 0.04 * 9
    before = policy("elastic", model).step(now, [], running, Limits())
    for level in range(len(LADDER)):
        for _ in range(200):
            step = step_totals(model.facts, [(p, Work(p.job.id, 1, level)) for p in running], LADDER)
            model.observe(step, 1.5 * float(model.base(step)))
    after = policy("elastic", model).step(now, [], running, Limits())
    assert sum(work.level for work in after) < sum(work.level for work in before)
    assert seconds(after, running, model) <= 0.04 * MARGIN * 1.01


# -- the backlog against a list


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["arrive", "take", "cancel", "wait"]), st.integers(0, 5)), max_size=40))
def test_backlog_equals_a_sorted_list(operations):
    backlog = Backlog(lambda p: p.job.arrival + (p.job.ttft or 3.0))
    waiting, now = [], 0.0
    for i, (what, n) in enumerate(operations):
        now += 0.1
        if what == "arrive":
            for j in range(n * 3):
                waiting.append(
                    waits(f"{i}.{j}", now, prompt=1 + j, ttft=[0.5, 2.0, None][j % 3], kind="ab"[j % 2], priority=n % 2)
                )
        elif what == "cancel" and waiting:
            del waiting[n % len(waiting)]
        elif what == "wait":
            now += 0.4 * n
        backlog.sync(waiting, now)
        if what == "take" and waiting:
            lane, queue = next(iter(backlog.lanes.items()))
            taken = backlog.take(lane, late=not queue.timely)
            waiting = [p for p in waiting if p is not taken]
            backlog.sync(waiting, now)
        due = sorted((p.job.arrival + (p.job.ttft or 3.0), p.job.prompt) for p in waiting)
        timely = [entry for entry in due if entry[0] >= now]
        assert sorted(map(tuple, backlog.timely()[:2].T.tolist())) == timely
        assert backlog.timely()[0].tolist() == sorted(backlog.timely()[0].tolist())
        assert backlog.late == len(due) - len(timely)
        assert backlog.late_tokens == sum(prompt for start, prompt in due if start < now)


def test_memory_does_not_grow_with_the_requests_that_went_by():
    chosen = policy("elastic")
    limits, running, waiting = Limits(requests=8, tokens=512), [], []
    for i in range(600):
        waiting = [*waiting, waits(f"w{i}", 0.1 * i, ttft=1.0, kind=f"k{i % 50}", priority=i % 3)][-20:]
        works = {work.id for work in chosen.step(0.1 * i, waiting, running, limits)}
        running = [Progress(p.job, p.job.prompt, p.generated + 1, 0.1 * i) for p in running if p.generated < 5]
        running += [Progress(p.job, p.job.prompt, 1, 0.1 * i) for p in waiting if p.job.id in works]
        waiting = [p for p in waiting if p.job.id not in works]
    rows, prompts = chosen._running, chosen._prompts
    assert len(rows._rows) <= 8
    assert len(rows._decode) <= 24
    assert len(prompts.backlog._known) == len(waiting)
    assert sum(map(len, prompts.backlog.lanes.values())) == len(waiting)
    assert len(prompts._served) <= 151  # one per class and priority, and the late ones


def test_totals_add_up():
    a, b = Totals(decode=1, unread=-0.5), Totals(decode=2, prefill=3)
    assert (a + b) == Totals(decode=3, prefill=3, unread=-0.5)
    assert Job("a", 0.0, 1, 1).ceiling == -1

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.errors import CorruptError, UsageError
from moe_prism.forecast.step_cost import StepSample, Totals
from moe_prism.schedule import CostModel, LayerFacts, Work
from moe_prism.schedule.totals import step_totals

from .common import FACTS, LADDER, cost, runs, waits


def samples(model: CostModel, n: int, noise: float = 0.0) -> list[StepSample]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(n):
        prompt, decodes = int(random.integers(0, 400)), int(random.integers(1, 64))
        a, b = random.choice([3.0, 5.0, 8.0, 10.0, 16.0], 2)
        chunk = model.chunk(prompt, float(a), int(random.integers(0, 300)))
        step = chunk + Totals(
            decode=decodes, decode_slots=decodes * b, decode_pairs=decodes * 200.0, unread=decodes * FACTS.unread(float(b))
        )
        found.append(StepSample(step, float(model.base(step)) * float(np.exp(noise * random.standard_normal()))))
    return found


def test_fit_recovers_the_formula_and_reports_held_out_error():
    true = cost(block=2e-4)
    model = CostModel.fit(FACTS, samples(true, 200))
    assert model.error is not None
    assert model.error.median < 1e-6
    assert model.error.samples == 50
    noisy = CostModel.fit(FACTS, samples(true, 400, noise=0.05))
    assert noisy.error is not None
    assert noisy.error.median < 0.05  # the noise itself has a median of 3.4 %
    assert min(vars(noisy.coefficients).values()) >= 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_fit_refuses_what_is_not_a_time(seconds):
    with pytest.raises(UsageError):
        CostModel.fit(FACTS, [*samples(cost(), 20), StepSample(Totals(decode=1), seconds)])
    with pytest.raises(UsageError):
        CostModel.fit(FACTS, samples(cost(), 5))


@given(n=st.integers(1, 100_000), more=st.integers(0, 1000), k=st.floats(0.5, 16), up=st.floats(0, 16))
def test_time_rises_in_tokens_and_in_slots_far_outside_what_was_measured(n, more, k, up):
    model = CostModel.fit(FACTS, samples(cost(block=2e-4), 60, noise=0.1))
    higher = min(k + up, 16.0)
    assert model.prefill(n + more, k) >= model.prefill(n, k) * (1 - 1e-12)
    assert model.prefill(n, higher) >= model.prefill(n, k) * (1 - 1e-12)
    assert model.decode(n + more, k, 100) >= model.decode(n, k, 100) * (1 - 1e-12)
    assert model.decode(n, higher, 100) >= model.decode(n, k, 100) * (1 - 1e-12)


def test_distinct_sub_experts_match_drawing_them():
    facts = LayerFacts(8, 2, 2)
    model = CostModel(facts, type(cost().coefficients)(0, 0, 0, 0, 0, 0, 0, 1.0))
    random = np.random.default_rng(0)
    drawn = np.mean([len(set(np.concatenate([random.choice(16, k, replace=False) for k in (2, 2, 4)]))) for _ in range(4000)])
    expected = model.base(Totals(decode=3, unread=sum(facts.unread(k) for k in (2, 2, 4))))
    assert expected == pytest.approx(drawn, rel=0.01)


def test_a_mixed_step_is_priced_part_by_part():
    model = cost(block=2e-4)
    parts = [(runs("a"), Work("a", 1, 0)), (runs("b"), Work("b", 1, 4)), (waits("c"), Work("c", 30, 2))]
    totals = step_totals(model.facts, parts, LADDER)
    assert totals.decode_slots == 19
    assert totals.prefill_slots == 240
    assert totals.decode_pairs == 102
    assert totals.prefill_pairs == 30 * 31 / 2
    prices = [
        model.base(step_totals(model.facts, [(p, Work(w.id, w.tokens, level)) for p, w in parts], LADDER)) for level in (0, 4)
    ]
    assert prices[0] < model.base(totals) < prices[1]


def test_correction_learns_near_what_was_observed_and_everywhere_else_the_mean():
    model = cost()
    step = Totals(decode=8, decode_slots=64, unread=8 * FACTS.unread(8))
    for _ in range(200):
        model.observe(step, 1.5 * float(model.base(step)))
    assert model.seconds(step) == pytest.approx(1.5 * float(model.base(step)), rel=1e-3)
    assert model.prefill(500, 16.0) == pytest.approx(1.5 * float(model.base(model.chunk(500, 16.0, 0))), rel=1e-3)
    model.observe(step, 1e6)  # one stall
    assert model.seconds(step) < 2 * float(model.base(step))


def test_the_first_observations_count_most():
    model, rounds = cost(), []
    step = Totals(decode=8, decode_slots=64, unread=8 * FACTS.unread(8))
    for _ in range(30):
        before = model.correction(step)
        model.observe(step, 2.0 * float(model.base(step)))
        rounds.append((model.correction(step) - before) / (2.0 - before))
    assert rounds[0] == pytest.approx(0.25)
    assert rounds[-1] == pytest.approx(0.05)
    assert all(later <= sooner + 1e-9 for sooner, later in pairwise(rounds))


def test_file_round_trip(tmp_path):
    model = CostModel.fit(FACTS, samples(cost(), 40))
    step = Totals(decode=8, decode_slots=64)
    model.observe(step, 1.0)
    model.save(tmp_path / "cost.json")
    again = CostModel.load(tmp_path / "cost.json")
    assert again.to_json() == model.to_json()
    assert again.seconds(step) == model.seconds(step)
    assert list(tmp_path.iterdir()) == [tmp_path / "cost.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("facts"),
        lambda d: d["coefficients"].update(step=-1),
        lambda d: d["coefficients"].update(step="x"),
        lambda d: d.update(version=2),
        lambda d: d.update(corrections=[1]),
        lambda d: d.update(everywhere=float("nan")),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    data = cost().to_json()
    damage(data)
    (tmp_path / "cost.json").write_text(json.dumps(data))
    with pytest.raises(CorruptError):
        CostModel.load(tmp_path / "cost.json")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UsageError):
        CostModel.load(tmp_path / "none.json")
    (tmp_path / "cost.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptError):
        CostModel.load(tmp_path / "cost.json")

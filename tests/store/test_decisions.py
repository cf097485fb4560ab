"""What deciding costs is measured, added to the forecast, and decides what is chosen. The clock is the test's: nothing here is timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_prism.cores import processor
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.jobs.forecast_offload import FitPrices, measure_budget
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.cache.lfu import LFU
from moe_prism.offload.predict import Predictor
from moe_prism.offload.replay import groups
from moe_prism.offload.settings import DECIDING, read_settings
from moe_prism.options.fit import FitOptions
from moe_prism.store.decisions import Decisions, request_seconds
from moe_prism.store.fit import Costs, FitWay, StoreFit, search
from moe_prism.store.fitted import measured_elsewhere
from moe_prism.store.pools import Eviction
from moe_prism.store.price_reads import ReadPrices
from tests.offload.common import make, next_layer, sticky
from tests.plug_ins import plug_in
from tests.store.common import PROMPT, opened, smallest

LAYERS = 3


class Clock:
    """Seconds that only what is measured lets pass."""

    now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


class SlowLfu(LFU):
    """Evicts as `lfu`, in Python that takes a tenth of a second per victim. It has no table, since it decides anew."""

    def victim(self, blocked, now):
        CLOCK.now += 0.1
        return super().victim(blocked, now)


class Oracle(Predictor):
    """Knows the trace of `next_layer`: what follows an expert. A guess takes `seconds`."""

    seconds = 0.0
    first_layer = 1

    def __init__(self, follows):
        self.follows = follows

    @classmethod
    def fit(cls, trace, space):
        follows = np.zeros((space.layers, space.experts), np.int64)
        for layer in range(1, space.layers):
            follows[layer, trace.expert_ids[:, layer - 1, 0]] = trace.expert_ids[:, layer, 0]
        return cls(follows)

    def arrays(self):
        return {"follows": self.follows}

    @classmethod
    def from_arrays(cls, arrays, space, hidden):
        return cls(arrays["follows"])

    def at(self, layer, seen):
        CLOCK.now += self.seconds
        out = np.zeros((len(seen.token), self.follows.shape[1]), np.float32)
        out[np.arange(len(out)), self.follows[layer, seen.expert_ids[:, layer - 1, 0]]] = 1
        return out


class SlowOracle(Oracle):
    seconds = 5.0


@pytest.fixture
def plugged(monkeypatch):
    predictors = {"oracle": Oracle, "slow-oracle": SlowOracle}
    plug_in(monkeypatch, {"moe_prism.cache-policy": {"slow-lfu": SlowLfu}, "moe_prism.predictor": predictors})


def fit_of(trace, slots, **costs):
    return StoreFit(trace, trace.space, slots, Costs(**{"layer": 1.0, "record": 1.0, **costs}), CLOCK)


@pytest.fixture(scope="module")
def domains():
    """Four experts of every token, which stay a while: counts beat recency."""
    return make(sticky(400, LAYERS, 12, 4), experts=12, request=np.arange(400) // 20)


@pytest.fixture(scope="module")
def chained():
    """Every expert after the first layer follows from the one before."""
    return make(next_layer(400, LAYERS, 12), experts=12, request=np.arange(400) // 20)


def test_a_policy_in_python_costs_what_its_requests_take_and_one_with_a_table_nothing(domains):
    own = Decisions(domains.space, 15, uncompiled=0.25, clock=CLOCK)
    asked = list(groups(domains.part("calibration"), domains.space))
    assert own.policy(Eviction(cache_policies.get("lfu"), group=4), asked) == 0
    assert own.policy(Eviction(cache_policies.get("belady"), group=4), asked) == 0
    slow = own.policy(Eviction(SlowLfu, group=4), asked)
    victims = (slow / LAYERS - 0.25) / 0.1  # of the request in the middle
    assert victims == pytest.approx(round(victims)) and 1 <= victims <= 4
    assert request_seconds(Eviction(cache_policies.get("hobbit")), domains.space, 15) is None


def test_a_policy_that_takes_longer_than_it_saves_is_not_chosen(domains, plugged):
    """It evicts as `lfu` does, so what it takes itself decides."""
    fit = fit_of(domains, 15)
    for names in (["lfu", "slow-lfu"], ["slow-lfu", "lfu"]):
        way, tried = search(fit, names, [], False, lambda: None)
        assert way.policy == "lfu"
        times = {each.policy: time for each, time in tried if each.quotas is None}
        assert times["slow-lfu"].reads == times["lfu"].reads
        assert times["slow-lfu"].seconds == pytest.approx(times["lfu"].seconds + times["slow-lfu"].deciding)
    assert times["slow-lfu"].deciding > times["lfu"].deciding == 0


def test_a_predictor_that_takes_longer_than_it_saves_is_not_chosen(chained, plugged):
    fit = fit_of(chained, 9)
    for name, pays in (("oracle", True), ("slow-oracle", False)):
        way, tried = search(fit, ["lru"], [name], False, lambda: None)
        assert (way.predictor == name) == pays
        found = next(time for each, time in tried if each.predictor == name)
        assert found.deciding == pytest.approx((LAYERS - 1) * (0.0 if pays else 5.0))
    way, _ = search(fit, ["lru"], ["slow-oracle"], True, lambda: None)
    assert (way.predictor, way.width) == ("slow-oracle", 0)  # it was named, so it is kept


def test_choosing_records_of_guessed_experts_costs_too(chained, plugged):
    for guess, pays in ((0.0, True), (5.0, False)):
        way, _ = search(fit_of(chained, 9, guess=guess), ["lru"], ["oracle"], False, lambda: None)
        assert bool(way.width) == pays


def test_what_the_computing_thread_does_for_a_read_hides_behind_nothing(chained, plugged):
    kind = Oracle.fit(chained, chained.space)
    way = FitWay("lru", {}, predictor="oracle", guess=kind, width=1)
    free, half = (fit_of(chained, 9, busy=busy) for busy in (0.0, 0.5))
    first, second = (fit.time(way, fit.choosing) for fit in (free, half))
    assert first.reads == second.reads and 0 < second.seconds - first.seconds <= 0.5 * first.reads


def test_settings_say_where_deciding_was_measured(domains, tmp_path, monkeypatch, plugged):
    found = fit_offload(domains, tmp_path / "s.json", FitOptions(policy=["lru"], predictor=["frequency"]))
    settings = read_settings(tmp_path / "s.json")
    assert settings.made[DECIDING] == {"processor": processor(), "ms": found.held_out[2].deciding_ms}
    assert measured_elsewhere(settings) is None
    monkeypatch.setattr("moe_prism.store.fitted.processor", lambda: "another")
    assert measured_elsewhere(settings) == processor()
    for made in ({}, {DECIDING: 1}, {DECIDING: {"processor": 1}}):  # a file of somebody else
        assert measured_elsewhere(replace(settings, made=made)) is None


def test_what_a_fit_is_told_is_measured_on_the_store(elastic_tiny, tmp_path):
    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    stored, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 12))
    ids = tokenizer(8 * PROMPT, return_tensors="pt").input_ids[:, :36]
    prices = ReadPrices([1, 2], [0.5, 1.0], [0.1, 0.3])
    step, own = measure_budget(stored, ids, 0.5, prices)
    assert own.guess > 0 <= own.uncompiled and stored._moe_prism.store.compiled
    found = FitPrices.of(prices, step, own)
    assert found.record == pytest.approx(500) and found.first == pytest.approx(0) and found.busy == pytest.approx(150)
    curve = ReadPrices([1, 4], [2.0, 3.5])
    assert FitPrices.of(curve, step, own)[1] == pytest.approx(500) and FitPrices.of(curve, step, own).first == pytest.approx(1500)
    assert found.guess == pytest.approx(1e3 * own.guess)


def test_what_reads_take_besides_is_paid_once_by_every_layer_that_misses(domains):
    one, two = (fit_of(domains, 15, first=first) for first in (0.0, 0.5))
    times = [fit.time(FitWay("lru", {}), fit.choosing) for fit in (one, two)]
    assert times[0].reads == times[1].reads
    assert 0 < times[1].seconds - times[0].seconds <= 0.5 * LAYERS


def test_work_is_never_more_than_the_whole_price():
    prices = ReadPrices([1, 4], [1.0, 2.5], [2.0, 2.0])
    assert [prices.work(n) for n in (0, 1, 4, 6)] == [0.0, 1.0, 2.0, 2.0]
    assert ReadPrices([1], [1.0]).work(3) == 0
    assert prices.over(1.0).busy == prices.busy

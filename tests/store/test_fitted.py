"""Fitted policies and predictors in a live store: reachable, refused without their fit, and never of any effect on the tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from moe_prism.cli import main
from moe_prism.errors import UsageError
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.jobs.forecast_offload import forecast_offload
from moe_prism.offload import cache_policies, predictors
from moe_prism.offload.cache.ranked import Ranked
from moe_prism.offload.predict import Predictor, Seen
from moe_prism.offload.predict.base import history
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.settings import read_settings
from moe_prism.options.fit import FitOptions
from moe_prism.options.offload import OffloadOptions
from moe_prism.store.fit import StoreFit, halves
from moe_prism.store.token_watch import TokenWatch
from tests.offload.common import make, next_layer
from tests.plug_ins import plug_in
from tests.store.common import PROMPT, logits, opened, smallest, store_of
from tests.tiers import by_night

SLOTS = 14
RUNNABLE = [n for n in cache_policies.names() if not cache_policies.get(n).needs_future]


class CountedUses(Ranked):
    """A policy of somebody else: worth = uses x a fitted factor."""

    def __init__(self, *args, factor=1.0, **settings):
        super().__init__(*args, **settings)
        self.factor, self.uses = factor, Counter()

    @classmethod
    def fit(cls, trace, space, slots):
        return {"factor": 2.0}

    @classmethod
    def shapes(cls, space):
        return {"factor": ()}

    def count(self, key, weight, now):
        self.uses[key] += 1

    def worth(self, key, now):
        return self.factor * self.uses[key]


class SameAgain(Predictor):
    """A predictor of somebody else: the experts of the layer before. Keeps what it was shown."""

    first_layer = 1
    shown: ClassVar[list[tuple[int, Seen]]] = []

    def __init__(self, size):
        self.size = size

    @classmethod
    def fit(cls, trace, space):
        return cls(np.array([space.experts], np.float32))

    def arrays(self):
        return {"size": self.size}

    @classmethod
    def from_arrays(cls, arrays, space, hidden):
        return cls(arrays["size"])

    def at(self, layer, seen):
        self.shown.append((layer, seen))
        out = np.zeros((len(seen.token), int(self.size[0]) + 1), np.float32)
        np.put_along_axis(out, seen.expert_ids[:, layer - 1].astype(np.int64), 1, axis=1)
        return out[:, :-1]


@pytest.fixture
def plugged(monkeypatch):
    """Both, as packages of others register them."""
    plug_in(
        monkeypatch, {"moe_prism.cache-policy": {"counted-uses": CountedUses}, "moe_prism.predictor": {"same-again": SameAgain}}
    )
    SameAgain.shown.clear()


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """Deciding takes no time: what it takes is for tests/store/test_decisions.py."""
    monkeypatch.setattr("moe_prism.jobs.fit_offload.StoreFit", partial(StoreFit, clock=lambda: 0.0))


@pytest.fixture(scope="module")
def world(elastic_tiny, tmp_path_factory):
    """(folder, packed file, bytes for SLOTS records, trace of both sides with inputs, ids [1, n])"""
    file = tmp_path_factory.mktemp("store") / "p"
    whole, tokenizer = opened(elastic_tiny, file)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = torch.cat([ids, ids.flip(1)], 1).unfold(1, 12, 6)[0][:6]
    trace = record(TraceRecorder(whole, inputs=True), [("calibration", text[:4]), ("evaluation", text[4:])], prompt=1)
    return elastic_tiny, file, smallest(whole, SLOTS), trace, ids, logits(whole, ids[:, :5])


def fitted(world, tmp_path, **asked):
    path = tmp_path / "settings.json"
    fit_offload(world[3], path, FitOptions(share=0.4, **asked), force=True)
    return path


@torch.no_grad()
def decoded(model, ids):
    """Logits of ids [1, n], fed token by token."""
    past, found = None, []
    for i in range(ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", by_night([*predictors.names(), "same-again"], "gate", "same-again"))
def test_every_predictor_reads_ahead_and_changes_no_logit(name, world, tmp_path, plugged):
    folder, file, memory, _, ids, wanted = world
    path = fitted(world, tmp_path, policy=["lru"], predictor=[name])
    stored, _ = opened(folder, file, memory, fitted=path, predictor=name, ahead=3)
    assert torch.equal(logits(stored, ids[:, :5]), wanted)
    plain, _ = opened(folder, file, memory)
    assert torch.equal(decoded(stored, ids[:, :12]), decoded(plain, ids[:, :12]))
    store = store_of(stored)
    store.settle()
    assert store.cache.counts.prefetched > 0
    assert (stored._moe_prism.ahead.seen is None) == (name == "gate")  # which needs nothing that others need


@pytest.mark.parametrize("name", by_night([*RUNNABLE, "counted-uses"], "lru", "lfu", "counted-uses"))
def test_every_policy_runs_as_it_was_fitted_and_changes_no_logit(name, world, tmp_path, plugged):
    folder, file, memory, _, ids, wanted = world
    path = fitted(world, tmp_path, policy=[name], predictor=["frequency"])
    stored, _ = opened(folder, file, memory, fitted=path)
    assert torch.equal(logits(stored, ids[:, :5]), wanted)
    policy = json.loads(path.read_text())
    assert policy["policy"] == name and set(policy["settings"]) == set(cache_policies.get(name).shapes(store_of(stored).space))
    if name == "counted-uses":
        assert all(pool.policy.factor == 2.0 for pool in store_of(stored).cache.pools)


@pytest.mark.parametrize("name", ["lru", "lfru", "arc", "counted-uses"])
def test_a_policy_without_a_compiled_table_says_what_that_costs(name, world, tmp_path, plugged, caplog):
    folder, file, memory, *_ = world
    stored, _ = opened(folder, file, memory, fitted=fitted(world, tmp_path, policy=[name], predictor=["frequency"]))
    told = [r.getMessage() for r in caplog.records if "no compiled table" in r.getMessage()]
    assert len(told) == (name in ("arc", "counted-uses"))
    assert all(f"'{name}'" in line and re.search(r"for \d+ us, `lru` for \d+,", line) for line in told)
    assert not len(store_of(stored).cache)  # what was asked was another cache


def test_a_live_predictor_is_shown_what_a_trace_shows_it(world, tmp_path, plugged):
    folder, file, memory, _, ids, _ = world
    row = ids[:, :9]
    whole, _ = opened(folder, file)
    trace = record(TraceRecorder(whole, inputs=True), [("evaluation", row)], prompt=1)
    path = fitted(world, tmp_path, policy=["lru"], predictor=["same-again"])
    stored, _ = opened(folder, file, memory, fitted=path, ahead=2)
    SameAgain.shown.clear()
    decoded(stored, row)
    past = history(trace)
    assert [layer for layer, _ in SameAgain.shown] == list(range(1, trace.layers)) * len(trace)
    for number, (layer, seen) in enumerate(SameAgain.shown):
        t = number // (trace.layers - 1)
        assert seen.token.tolist() == [trace.token[t]]
        assert seen.history.tolist() == [past[t].tolist()]
        np.testing.assert_array_equal(seen.expert_ids, trace.expert_ids[t : t + 1, :layer])
        np.testing.assert_allclose(seen.inputs, trace.inputs[t : t + 1, layer - 1], rtol=2e-3, atol=2e-3)


def test_history_is_unknown_where_rows_change_or_nothing_is_cached():
    class Cache:
        length = 0

        def get_seq_length(self):
            return self.length

    model, cache = torch.nn.Module(), Cache()
    model.forward = lambda **_: None
    watch = TokenWatch(model)
    model(input_ids=torch.tensor([[1, 2], [3, 4]]), past_key_values=cache)
    assert watch.of(4)[0].tolist() == [1, 2, 3, 4] and watch.of(4)[1][:, 0].tolist() == [-1, 1, -1, 3]
    cache.length = 2
    model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    assert watch.of(2)[1].tolist() == [[2, 1, -1, -1], [4, 3, -1, -1]]
    assert (watch.of(3)[0] == -1).all() and (watch.of(3)[1] == -1).all()  # a batch of another size: nothing is known
    cache.length = 3
    model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert watch.of(1)[1].tolist() == [[-1] * 4]  # a row has left
    model(input_ids=torch.tensor([[8]]))
    assert watch.of(1)[1].tolist() == [[-1] * 4]
    model(inputs_embeds=torch.zeros(1, 1, 4))
    assert watch.of(1)[0].tolist() == [-1]


def test_what_was_not_fitted_is_refused_by_name(world, tmp_path):
    folder, file, memory, *_ = world
    path = fitted(world, tmp_path, policy=["lfu"], predictor=["token"])
    for options, reason in (
        ({"predictor": "token", "ahead": 2}, r"the predictor 'token' is fitted on a trace.*moe-prism offload fit TRACE"),
        ({"predictor": "dictionary", "ahead": 2, "fitted": path}, "the predictor 'dictionary' is fitted"),
        ({"predictor": "gate"}, "give --expert-ahead"),
        ({"predictor": "gat"}, "did you mean 'gate'"),
        ({"policy": "hobbit"}, r"'hobbit' is fitted on a trace.*moe-prism offload fit TRACE"),
        ({"policy": "static", "fitted": path}, "'static' is fitted"),
        ({"policy": "belady", "fitted": path}, "knows the future"),
    ):
        with pytest.raises(UsageError, match=reason):
            opened(folder, file, memory, **options)


def test_the_choice_does_not_look_at_the_evaluation_side(world):
    trace = world[3]
    fit, choose = halves(trace.part("calibration").decode())
    assert not set(np.unique(fit.request)) & set(np.unique(choose.request))
    asked = FitOptions(share=0.4, policy=["lru", "lfu"], predictor=["token", "frequency"])
    other = replace(trace, expert_ids=np.where(trace.side[:, None, None] == 1, trace.expert_ids[::-1], trace.expert_ids))
    one, two = (fit_offload(each, None, asked) for each in (trace, other))
    assert one.tried == two.tried and one.held_out != two.held_out
    assert one.settings.policy == two.settings.policy and one.settings.width == two.settings.width


def test_reading_ahead_is_off_where_it_does_not_pay():
    """Each layer's expert follows from the one before, so the dictionary is always right."""
    trace = make(next_layer(240, 3, 12), experts=12, request=np.arange(240) // 20)
    asked = FitOptions(share=0.4, policy=["lru"], predictor=["dictionary"])
    dear = fit_offload(trace, None, replace(asked, layer_ms=1e-6))
    assert dear.settings.predictor == "dictionary" and dear.settings.width == 0 and len(dear.held_out) == 3
    free = fit_offload(trace, None, replace(asked, layer_ms=1e3))
    assert free.settings.width > 0 and len(free.held_out) == 4
    assert free.held_out[2].ms_per_token < free.held_out[3].ms_per_token
    bound, bare = free.held_out[1], free.held_out[3]
    assert bound.hit_rate >= bare.hit_rate


def test_slots_by_predicted_need_are_tried_and_written(tmp_path, monkeypatch):
    """Tokens say which experts are needed: of eight for a while in the first layer, of two and three in the others."""
    draw = np.random.default_rng(0)
    token = np.concatenate([phase * 8 + draw.integers(8, size=40) for phase in [*range(6), *range(6)]])
    phase, j = token // 8, token % 8
    ids = np.stack([token % 24, (phase * 2 + j % 2) % 24, (phase * 3 + j % 3) % 24], axis=1)[:, :, None]
    trace = make(ids, experts=24, token=token.astype(np.int32), request=np.arange(480) // 20)
    asked = FitOptions(share=13 / 72, policy=["lru"], predictor=["token"], record_ms=5)
    found = fit_offload(trace, None, asked)
    rows = {(row.quotas, row.predictor): row for row in found.tried}
    assert rows["need", ""].hit_rate > rows["", ""].hit_rate and ("misses", "") in rows
    monkeypatch.setattr(StoreFit, "with_quotas", lambda fit, way: way)
    chosen = fit_offload(trace, tmp_path / "s.json", asked)
    assert chosen.settings.quotas == read_settings(tmp_path / "s.json").quotas == (7, 3, 3)
    assert chosen.held_out[2].quotas == "need" and chosen.held_out[2].hit_rate > chosen.held_out[0].hit_rate


def test_forecasts_compare_the_fitted_way(world, tmp_path, plugged):
    folder, file, memory, *_ = world
    path = fitted(world, tmp_path, policy=["hobbit"], predictor=["same-again"])
    options = OffloadOptions(expert_file=file, tokens=160, budgets=(1.0,), expert_settings=path, expert_ahead=2)
    found = forecast_offload(folder, memory, options)
    assert {"hobbit", "counted-uses", "lru"} <= {way.policy for way in found.ways}
    assert "static" not in {way.policy for way in found.ways}
    assert {way.ahead for way in found.ways} == {0, 2}
    assert found.layer_ms > 0 and found.record_ms > 0


def test_every_name_is_tried_where_none_is_asked_for(world, tmp_path, plugged):
    """By `offload fit`, plug-ins too; `offload` forecasts every policy that needs no fit, and the one that was fitted."""
    folder, file, memory, trace, *_ = world
    found = fit_offload(trace, tmp_path / "s.json", FitOptions(share=0.4))
    assert {row.policy for row in found.tried} == {*RUNNABLE, "counted-uses"}
    asked = FitOptions(share=0.4, policy=["lru"], predictor=[*predictors.names(), "same-again"], layer_ms=1e3)
    fitted_all = fit_offload(trace, None, asked)
    assert {row.predictor for row in fitted_all.tried} - {""} == {*predictors.names(), "same-again"}
    path = fitted(world, tmp_path, policy=["static"], predictor=["frequency"])
    forecast = forecast_offload(
        folder, memory, OffloadOptions(expert_file=file, tokens=160, budgets=(1.0,), expert_settings=path)
    )
    needs = {name for name in RUNNABLE if cache_policies.get(name).needs_fit}
    assert {way.policy for way in forecast.ways} == ({*RUNNABLE, "counted-uses"} - needs) | {"static"}


def test_commands(world, tmp_path, capsys):
    folder, file, memory, trace, *_ = world
    trace.save(tmp_path / "trace.npz")
    path = tmp_path / "settings.json"
    words = ["offload", "fit", str(tmp_path / "trace.npz"), "-o", str(path), "--share", "0.4", "--policy", "hobbit"]
    assert main([*words, "--predictor", "token", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "hobbit"
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    for more, reason in (
        (["--policy", "belady"], "knows the future"),
        (["--parts", "3"], "leave --parts out"),
        (["--share", "0"], "--share"),
    ):
        assert main(["offload", "fit", str(tmp_path / "trace.npz"), "-o", str(path), "--force", *more]) == 2
        assert reason in capsys.readouterr().err
    base = ["generate", str(folder), "--prompt", "import os", "--max-tokens", "4", "--expert-file", str(file), "--json"]
    base += ["--expert-memory", str(memory)]
    texts = []
    for more in (
        [],
        ["--expert-settings", str(path)],
        ["--expert-settings", str(path), "--expert-predictor", "token", "--expert-ahead", "2"],
    ):
        assert main([*base, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(texts)) == 1
    assert main([*base, "--expert-policy", "hobbit"]) == 2
    assert "moe-prism offload fit" in capsys.readouterr().err

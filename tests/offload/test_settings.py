"""Fitted settings and predictors survive a file, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moe_prism.errors import CorruptError, UsageError
from moe_prism.offload import KeySpace, cache_policies, predictors
from moe_prism.offload.quotas import scaled
from moe_prism.offload.settings import ExpertSettings, policy_of, predictor_of, read_settings, write_settings

from .common import make, sticky

HIDDEN = 6


@pytest.fixture(scope="module")
def trace():
    ids, draw = sticky(120, 3, 8, 2), np.random.default_rng(0)
    found = make(ids, experts=8, token=draw.integers(0, 9, 120).astype(np.int32), request=np.arange(120) // 20)
    inputs, routers = draw.normal(size=(120, 3, HIDDEN)), draw.normal(size=(3, 8, HIDDEN))
    return replace(found, inputs=inputs.astype(np.float16), routers=routers.astype(np.float32))


@pytest.mark.parametrize("name", predictors.names())
def test_a_predictor_is_the_same_after_a_file(name, trace, tmp_path):
    fitted = predictors.get(name).fit(trace, trace.space)
    write_settings(tmp_path / "s.json", ExpertSettings(trace.space, 6, "lru", predictor=name, width=2, arrays=fitted.arrays()))
    settings = read_settings(tmp_path / "s.json")
    again = predictors.get(name).from_arrays(settings.arrays, trace.space, HIDDEN)
    np.testing.assert_array_equal(again.scores(trace), fitted.scores(trace))
    assert (settings.predictor, settings.width) == (name, 2)


@pytest.mark.parametrize("name", predictors.names())
def test_arrays_that_do_not_fit_the_model_are_refused(name, trace):
    arrays = predictors.get(name).fit(trace, trace.space).arrays()
    kind, first = predictors.get(name), next(iter(arrays))
    wrong = [
        {**arrays, "more": arrays[first]},
        {n: a for n, a in arrays.items() if n != first},
        {**arrays, first: arrays[first].astype(np.float64)},
        {**arrays, first: arrays[first][..., :-1]},
        {n: np.full_like(a, np.nan) if a.dtype == np.float32 else a for n, a in arrays.items()},
    ]
    for each in wrong:
        with pytest.raises(CorruptError, match="predictor"):
            kind.from_arrays(each, trace.space, HIDDEN)
    with pytest.raises(CorruptError, match="predictor"):
        kind.from_arrays(arrays, KeySpace(3, 9), HIDDEN)


@pytest.mark.parametrize("name", [n for n in cache_policies.names() if not cache_policies.get(n).needs_future])
def test_settings_of_every_policy_survive_a_file(name, trace, tmp_path):
    fitted = json.loads(json.dumps(cache_policies.get(name).fit(replace(trace, inputs=None), trace.space, 4)))
    write_settings(tmp_path / "s.json", ExpertSettings(trace.space, 12, name, fitted, (5, 4, 3)))
    settings = read_settings(tmp_path / "s.json")
    assert policy_of(settings, trace.space) == (cache_policies.get(name), fitted)
    assert settings.quotas == (5, 4, 3)
    with pytest.raises(UsageError, match="the settings are for 3 layers of 8 experts in 1 parts, this store has"):
        policy_of(settings, KeySpace(3, 8, 4))


def test_settings_that_no_fit_returns_are_refused():
    space = KeySpace(3, 8)
    for policy, settings in (
        ("lru", {"seed": 1}),
        ("hobbit", {"mix": [1, 0, 0], "high": 0.5}),
        ("hobbit", {"mix": [1, 0, 0, "0"], "high": 0.5}),
        ("hobbit", {"mix": [1, 0, 0, 0]}),
        ("hobbit", {"mix": [1, 0, 0, [0]], "high": 0.5}),
        ("static", {"profile": [0.0] * 23}),
        ("static", {"profile": None}),
        ("reuse", {"coefficients": [[1, 2, 3, True]] * 3}),
    ):
        with pytest.raises(CorruptError, match="fit it again"):
            policy_of(ExpertSettings(space, 6, policy, settings), space)


def test_a_file_that_was_changed_is_refused(trace, tmp_path):
    path, beside = tmp_path / "s.json", tmp_path / "s.safetensors"
    arrays = predictors.get("token").fit(trace, trace.space).arrays()
    write_settings(path, ExpertSettings(trace.space, 6, "lru", predictor="token", width=2, arrays=arrays))
    good = json.loads(path.read_text())
    for change in (
        {"more": 1},
        {"schema": 2},
        {"kind": "plan"},
        {"layers": 0},
        {"quotas": [1, 2]},
        {"quotas": [0, 1, 2]},
        {"policy": ""},
        {"settings": []},
        {"predictor": {"name": "token", "width": -1}},
        {"predictor": {"name": "token", "width": 2, "file": "../s.safetensors", "sha256": "0" * 64}},
        {"predictor": {**good["predictor"], "sha256": "0" * 64}},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CorruptError):
            read_settings(path)
    path.write_text(json.dumps(good))
    assert set(read_settings(path).arrays) == {"ids", "shares", "prior"}
    beside.write_bytes(beside.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="not the file that the settings name"):
        read_settings(path)
    beside.unlink()
    with pytest.raises(UsageError, match="cannot read"):
        read_settings(path)
    with pytest.raises(UsageError, match="moe-prism offload fit"):
        read_settings(tmp_path / "none.json")
    assert predictor_of(ExpertSettings(trace.space, 6, "lru"), trace.space, HIDDEN) is None


@pytest.mark.parametrize(("shares", "slots", "most", "found"), [
    ([1, 1, 1], 8, 8, [3, 3, 2]),
    ([4, 2, 2], 16, 8, [8, 4, 4]),
    ([9, 1, 1], 11, 6, [6, 3, 2]),
    ([100, 1, 1], 3, 8, [1, 1, 1]),
    ([1, 2, 3], 99, 4, [4, 4, 4]),
])  # fmt: skip
def test_quotas_keep_their_proportion(shares, slots, most, found):
    assert scaled(shares, slots, most) == found
    with pytest.raises(UsageError, match="too few"):
        scaled(shares, 2, most)

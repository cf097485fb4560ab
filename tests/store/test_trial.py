"""Reading ahead is tried in turns, and goes on only where it pays."""

from __future__ import annotations

import random

import pytest
import torch

from moe_prism.cli import main
from moe_prism.errors import UsageError
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.options.experts import ExpertOptions
from moe_prism.options.fit import FitOptions
from moe_prism.store.trial import AGAIN, BLOCK, LEAST, MOST, AheadTrial
from tests.store.common import PROMPT, opened, smallest, store_of


def steps_until_decided(more, noise=0.0, seed=0):
    """(decision, steps) where reading ahead makes a step of a millisecond longer by `more`."""
    draw, told = random.Random(seed), []
    trial, count = AheadTrial(lambda *what: told.append(what)), 0
    while trial.decided is None:
        trial.note(1e-3 + more * trial.reads + noise * draw.random())
        count += 1
        assert count <= 2 * BLOCK * MOST
    assert told == [(trial.decided, pytest.approx(told[0][1]))]
    return trial.decided, count


def test_what_costs_stops_and_what_saves_goes_on():
    assert steps_until_decided(2e-4, 2e-4) == (False, 2 * BLOCK * LEAST)
    assert steps_until_decided(-2e-4, 2e-4) == (True, 2 * BLOCK * LEAST)


def test_noise_is_no_reason():
    """Over many draws, what saves a tenth of a step under noise as large as it is kept, and what costs one is stopped."""
    for more, wanted in ((1e-4, False), (-1e-4, True)):
        found = [steps_until_decided(more, 3e-4, seed)[0] for seed in range(40)]
        assert found.count(wanted) >= 38


def test_turns_do_not_depend_on_a_load_that_drifts():
    trial, at = AheadTrial(lambda *_: None), 0
    while trial.decided is None:
        trial.note(1e-3 * (1 + at / 200) - 2e-4 * trial.reads)
        at += 1
    assert trial.decided


def test_it_is_tried_again():
    trial = AheadTrial(lambda *_: None)
    while trial.decided is None:
        trial.note(1e-3 + 1e-4 * trial.reads)
    assert not trial.reads
    for _ in range(AGAIN):
        trial.note(1.0)
    assert trial.decided is None and trial.reads


@torch.no_grad()
def decoded(model, ids):
    out, found = model(input_ids=ids[:, :2], use_cache=True), []
    for i in range(2, ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


def test_a_store_reads_ahead_in_turns_and_stops(elastic_tiny, tmp_path, monkeypatch):
    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = decoded(whole, ids)
    model, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 16), ahead=3, tries_ahead=True)
    store, trial = store_of(model), model._moe_prism.ahead.trial
    heard, own = [], trial.note
    trial.note = lambda seconds: (heard.append((trial.reads, seconds)), own(seconds))
    assert torch.equal(decoded(model, ids), wanted)
    assert len(heard) == ids.shape[1] - 1 and all(seconds > 0 for _, seconds in heard)
    assert store.cache.counts.prefetched
    trial.decided = False
    before = store.cache.counts.prefetched
    assert torch.equal(decoded(model, ids), wanted)
    assert store.cache.counts.prefetched == before
    store.close()


def test_the_first_layer_is_read_for_as_soon_as_the_ids_are_known(elastic_tiny, tmp_path):
    from moe_prism.offload.record import TraceRecorder, record

    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = torch.cat([ids, ids.flip(1)], 1).unfold(1, 12, 6)[0][:6]
    trace = record(TraceRecorder(whole), [("calibration", text[:4]), ("evaluation", text[4:])], prompt=1)
    path = tmp_path / "settings.json"
    fit_offload(trace, path, FitOptions(share=0.4, policy=["lfu"], predictor=["token"]))
    wanted = decoded(whole, ids)
    model, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 16), ahead=3, fitted=path)
    store, seen, own = store_of(model), [], store_of(model).prefetch
    store.prefetch = lambda layer, keys: (seen.append((layer, keys)), own(layer, keys))
    assert torch.equal(decoded(model, ids), wanted)
    first = [keys for layer, keys in seen if layer == 0]
    assert len(first) == ids.shape[1] - 1
    assert all(1 <= len(keys) <= 3 and set(keys) <= set(store.space.of_layer(0)) for keys in first)
    store.close()


def test_the_option(elastic_tiny, tmp_path, capsys):
    with pytest.raises(UsageError, match="expert-ahead-always"):
        ExpertOptions(expert_memory="1MB", expert_ahead_always=True).check_used()
    arguments = ["generate", str(elastic_tiny), "--prompt", "x", "--max-tokens", "2", "--expert-memory", "1MB"]
    file = ["--expert-file", str(tmp_path / "p")]
    assert main([*arguments, *file, "--expert-ahead", "2", "--expert-ahead-always"]) == 0
    assert main([*arguments, *file, "--expert-ahead", "2"]) == 0
    assert main([*arguments, *file, "--expert-ahead-always"]) == 2
    assert "--expert-ahead" in capsys.readouterr().err

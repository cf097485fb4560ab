"""Fate's precision by popularity: in prompts what few tokens use is read in the smaller form, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch

from moe_prism.checkpoint import read_manifest
from moe_prism.cli import main
from moe_prism.elastic import operating_point
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.fit_shares import RATES, RateRow, reads_least
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.kernels.plane_tiles import AVAILABLE
from moe_prism.offload.keys import KeySpace
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.settings import ExpertSettings, read_settings, write_settings
from moe_prism.store import write_pack
from moe_prism.store.choose_misses import FEW_TOKENS, Misses, rare
from moe_prism.store.plane_layout import PlaneStorage
from tests.store.common import PROMPT, logits, opened, smallest, store_of
from tests.tiny_sources import save_tiny


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_the_least_used_are_rare_up_to_the_rate(rate):
    index, kept = torch.randint(0, 7, (40, 3)), torch.rand(40, 3) < 0.8
    uses = [int((index[kept] == e).sum()) for e in range(8)]
    found, total, wanted = rare(index, kept, 8, rate), 0, set()
    for e in sorted(range(8), key=lambda e: uses[e]):
        total += uses[e]
        if total > rate * sum(uses):
            break
        wanted.add(e)
    assert set(found.nonzero()[:, 0].tolist()) == wanted and (rate < 1 or bool(found.all()))


def test_rates_outside_are_refused_and_zero_is_exact():
    for rate in (-0.1, 1.1):
        with pytest.raises(UsageError, match="prompt rate"):
            Misses(prompt_rate=rate)
    assert Misses(prompt_rate=0.3).is_exact(FEW_TOKENS) and not Misses(prompt_rate=0.3).is_exact(FEW_TOKENS + 1)
    assert not Misses(prompt_rate=0.3).is_exact() and Misses().is_exact()


@torch.no_grad()
def test_a_prompt_reads_its_rare_experts_in_int8_and_steps_read_none(elastic_half, tmp_path):
    exact, tokenizer = opened(elastic_half, tmp_path / "exact")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :24]
    stored, _ = opened(elastic_half, tmp_path / "low", misses=Misses(prompt_rate=0.4))
    store = store_of(stored)
    for i in range(4):  # few tokens: exact, and by compiled calls where those are
        assert torch.equal(logits(stored, ids[:, i : i + 1]), logits(exact, ids[:, i : i + 1]))
    assert not store.fetcher.low
    stored, _ = opened(elastic_half, tmp_path / "low", misses=Misses(prompt_rate=0.4))
    store = store_of(stored)
    found = logits(stored, ids)
    low = {(store.space.layer(key), store.space.expert(key)) for key in store.fetcher.low}
    whole, _ = opened(elastic_half, tmp_path / "exact")
    with operating_point(whole):
        ran = torch.from_numpy(record(TraceRecorder(whole), [("evaluation", ids)], prompt=24).expert_ids.astype("int64"))
    first = ran[:, 0]  # later layers run on what the first one put out
    used = rare(first, first >= 0, store.space.experts, 0.4)
    assert {e for layer, e in low if layer == 0} == set(used.nonzero()[:, 0].tolist()) & set(first.flatten().tolist())
    assert low and not torch.equal(found, logits(exact, ids)) and (found - logits(exact, ids)).abs().max() < 0.5
    warm, _ = opened(elastic_half, tmp_path / "low")
    logits(warm, ids)
    warm._moe_prism.misses = Misses(prompt_rate=1.0)
    assert torch.equal(logits(warm, ids), logits(exact, ids))  # what is there is used as it is


@pytest.mark.skipif(not AVAILABLE, reason="this processor has no products of bytes")
@torch.no_grad()
def test_a_prompt_reads_the_upper_planes_alone_of_rare_experts(shared, tmp_path_factory, tiny_calibration):
    source = tmp_path_factory.mktemp("wide") / "m"
    save_tiny("olmoe", source, hidden_size=64, intermediate_size=128, num_experts=6)
    options = RefactorOptions(calibration=tiny_calibration, gates=0, n_sub=4)
    folder = shared("elastic-wide-0", lambda out: refactor(source, out, options))
    file = tmp_path_factory.mktemp("planes") / "p"
    write_pack(folder, file, read_manifest(folder), planes=PlaneStorage(group=32))
    exact, tokenizer = opened(folder, file)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :24]
    wanted = logits(exact, ids)
    reads = []
    for rate in (0.0, 0.4, 1.0):
        stored, _ = opened(folder, file, misses=Misses(prompt_rate=rate))
        found, store = logits(stored, ids), store_of(stored)
        reads.append(store.times.bytes)
        lower = [store.resident(layer).reshape(6, -1, 2)[:, :, 1] for layer in range(2)]
        assert torch.equal(found, wanted) == (rate == 0) and (rate < 1 or not any(own.any() for own in lower))
        assert all((own.all(1) | ~own.any(1)).all() for own in lower)  # of an expert all or none
    assert reads[0] > reads[1] > reads[2]
    stored._moe_prism.misses = Misses()
    logits(stored, ids)
    stored._moe_prism.misses = Misses(prompt_rate=1.0)
    torch.testing.assert_close(logits(stored, ids), wanted)  # lower planes that are there are used


def test_the_rate_that_reads_least_within_the_loss_is_chosen():
    rows = [RateRow(0.0, 0.0, 9.0), RateRow(0.2, 0.01, 7.0), RateRow(0.5, 0.1, 5.0)]
    assert [reads_least(rows, most) for most in (0.0, 0.05, 1.0)] == rows
    assert RATES[0] == 0


def test_a_rate_comes_from_the_settings_and_from_the_command(elastic_half, tmp_path, capsys, monkeypatch):
    whole, _ = opened(elastic_half, tmp_path / "p")
    space = store_of(whole).space
    path = tmp_path / "settings.json"
    write_settings(path, ExpertSettings(KeySpace(space.layers, space.experts, space.parts), 6, "lru", prompt_rate=0.3))
    assert read_settings(path).prompt_rate == 0.3
    stored, _ = opened(elastic_half, tmp_path / "low", smallest(whole, 6), fitted=path)
    assert stored._moe_prism.misses == Misses(prompt_rate=0.3)
    form = json.loads(path.read_text())
    path.write_text(json.dumps({**form, "prompt_rate": 1.5}))
    with pytest.raises(CorruptError):
        read_settings(path)
    asked: list[Misses] = []
    monkeypatch.setattr("moe_prism.store.load.Misses.__post_init__", lambda misses: asked.append(misses))
    command = ["generate", str(elastic_half), "--prompt", PROMPT, "--max-tokens", "2", "--expert-file", str(tmp_path / "low")]
    assert main([*command, "--expert-memory", "1MB", "--prompt-rate", "0.4"]) == 0
    assert Misses(prompt_rate=0.4) in asked
    assert main([*command, "--prompt-rate", "0.4"]) == 2
    assert "of no use alone" in capsys.readouterr().err

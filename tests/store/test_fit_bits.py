"""EdgeMoE's bits of each expert from a fit to a store of planes: within the loss, written, followed, and served."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.cli import main
from moe_prism.cli.experts import store_options
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs import fit_bits
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.kernels.plane_tiles import AVAILABLE
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.settings import read_settings, write_settings
from moe_prism.options.experts import ExpertOptions
from moe_prism.options.fit import FitOptions
from moe_prism.progress import silent
from moe_prism.store import write_pack
from moe_prism.store.choose_misses import Misses
from moe_prism.store.plane_layout import PlaneStorage
from tests.offload.common import make, next_layer
from tests.serve.house import open_house
from tests.store.common import PROMPT, logits, opened, store_of
from tests.tiny_sources import save_tiny

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this processor has no products of bytes")


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory, tiny_calibration):
    source = tmp_path_factory.mktemp("wide") / "m"
    save_tiny("olmoe", source, hidden_size=64, intermediate_size=128, num_experts=6)
    options = RefactorOptions(calibration=tiny_calibration, gates=0, n_sub=4)
    return shared("elastic-wide-0", lambda out: refactor(source, out, options))


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("planes") / "planes.pack"
    write_pack(folder, path, read_manifest(folder), planes=PlaneStorage(group=32))
    return path


@pytest.fixture(scope="module")
def fitted(folder, text_file, tmp_path_factory):
    """(settings, what the fit found)"""
    model, tokenizer = load(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :24].reshape(4, 6)
    trace = record(TraceRecorder(model), [("calibration", ids[:2]), ("evaluation", ids[2:])], prompt=1)
    path = tmp_path_factory.mktemp("fit") / "settings.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fit_bits, "OPTIONS", replace(fit_bits.OPTIONS, text=str(text_file), length=32, tokens=64, calibration_tokens=64)
        )
        with pytest.raises(UsageError, match="leaves no expert fewer bits"):
            fit_bits.fit_bits(folder, 0.0, silent)
        most = fit_bits.fit_bits(folder, 100.0, silent)
        assert {bits for own in most.expert_bits for bits in own} == {4}
        asked = FitOptions(share=0.4, policy=["lru"], predictor=["frequency"], folder=folder, max_kl=most.kl / 2, planes=True)
        found = fit_offload(trace, path, asked)
        other = make(next_layer(48, 3, 12), experts=12, request=np.arange(48) // 6)
        with pytest.raises(UsageError, match="of another model"):
            fit_offload(other, None, asked)
    return path, found


@torch.no_grad()
def test_experts_are_read_at_the_bits_that_were_fitted(folder, file, fitted):
    path, found = fitted
    bits = read_settings(path).expert_bits
    assert found.bits is not None and bits == found.bits.expert_bits and found.to_json()["bits"]["kl"] == found.bits.kl
    assert {each for own in bits for each in own} == {4, 8} and found.loss is None
    stored, tokenizer = opened(folder, file, fitted=path, ahead=0)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    got, store = logits(stored, ids), store_of(stored)
    for layer, own in enumerate(bits):
        narrow = torch.tensor(own) == 4
        both = torch.from_numpy(store.resident(layer).reshape(6, -1, 2))
        assert not both[narrow][:, :, 1].any() and torch.equal(both[~narrow][:, :, 0], both[~narrow][:, :, 1])
    assert not torch.equal(got, logits(opened(folder, file)[0], ids))


@pytest.mark.slow
def test_a_server_and_a_command_follow_them(folder, file, fitted, capsys):
    path, _ = fitted
    command = ["generate", str(folder), "--prompt", "import os", "--max-tokens", "6", "--expert-memory", "100MB", "--json"]
    assert main([*command, "--expert-file", str(file), "--expert-settings", str(path), "--expert-ahead", "0"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    options = store_options(ExpertOptions(expert_memory="100MB", expert_file=file, expert_settings=path, expert_ahead=0))
    with open_house(folder, store=options) as house:
        body = {"model": "tiny", "prompt": "import os", "max_tokens": 6, "temperature": 0}
        answer = httpx2.post(f"{house.url}/completions", json=body, timeout=60)
        assert answer.status_code == 200 and text.endswith(answer.json()["choices"][0]["text"])
        assert house.built.service.engine.model._moe_prism.expert_bits is not None


def test_settings_for_records_of_the_other_kind_are_refused(folder, file, fitted, tmp_path):
    path, _ = fitted
    own = read_settings(path)
    with pytest.raises(UsageError, match="the records are no planes"):
        opened(folder, tmp_path / "plain", fitted=path)
    other = tmp_path / "settings.json"
    write_settings(other, replace(own, expert_bits=None, shares=(0.4, 0.9)))
    with pytest.raises(UsageError, match="not fitted for planes"):
        opened(folder, file, fitted=other)
    opened(folder, file, fitted=other, misses=Misses(shares=(1.0, 1.0)))
    write_settings(other, replace(own, policy="static", settings={"profile": [1.0] * len(own.space)}))
    with pytest.raises(UsageError, match="fitted is of whole records"):
        opened(folder, file, fitted=other)
    form = json.loads(path.read_text())
    for wrong in ([[4] * 6], [[4] * 5, [4] * 6], [[9] * 6] * 2):
        other.write_text(json.dumps({**form, "expert_bits": wrong}))
        with pytest.raises(CorruptError):
            read_settings(other)
    with pytest.raises(UsageError, match="--planes fits bits on a model"):
        FitOptions(planes=True).check()

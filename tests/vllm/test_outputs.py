"""What we write runs in vLLM without our plug-in: greedy tokens are those of our own loader. `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from moe_prism.jobs.compress import compress_model
from moe_prism.jobs.prune import prune_model
from moe_prism.model import load_model, load_tokenizer
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.compress import CompressOptions
from moe_prism.options.prune import PruneOptions
from moe_prism.serve.vllm import compat
from tests.vllm.prompts import NEW_TOKENS, SHORT

CALIBRATION = CalibrateOptions(tokens=4096)
WAYS: dict[str, tuple[str, PruneOptions | CompressOptions]] = {
    "narrower": ("nano", CompressOptions(method="heapr", keep=0.75, calibration=CALIBRATION)),
    "zeros in place": ("nano", CompressOptions(method="heapr", keep=0.75, widths="own", calibration=CALIBRATION)),
    "removed": ("nano", PruneOptions(criterion="easy-ep", keep=0.75, calibration=CALIBRATION)),
    "constant": ("nano", PruneOptions(criterion="mone", keep=0.75, allocation="global", calibration=CALIBRATION)),
    "constant of an elastic folder": ("elastic", PruneOptions(criterion="mone", keep=0.75, calibration=CALIBRATION)),
}


def in_vllm(folder: Path, file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.vllm.stock", str(folder), str(file)]
    return subprocess.run(command, env={**os.environ, **env}, timeout=900, capture_output=True, text=True, check=False)


@torch.no_grad()
def ours(folder: Path) -> list[list[int]]:
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    rows = [tokenizer(text, return_tensors="pt") for text in SHORT]
    found = [model.generate(**row, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)[0] for row in rows]
    return [ids[row["input_ids"].shape[1] :].tolist() for ids, row in zip(found, rows, strict=True)]


@pytest.fixture(scope="module", params=WAYS)
def written(request, elastic_nano, tmp_path_factory) -> Path:
    source, options = WAYS[request.param]
    out = tmp_path_factory.mktemp("written") / "out"
    if isinstance(options, CompressOptions):
        compress_model(source, out, options)
    else:
        prune_model(elastic_nano if source == "elastic" else source, out, options)
    return out


def test_greedy_tokens_are_our_own(written, tmp_path):
    constant = "approximate_experts" in json.loads((written / "config.json").read_text())
    if constant and not compat.knows_constant_experts():
        assert "vLLM 0.33 or newer" in in_vllm(written, tmp_path / "tokens.json").stderr  # with the plug-in, which says so
        return
    run = in_vllm(written, tmp_path / "tokens.json", VLLM_PLUGINS="none")
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((tmp_path / "tokens.json").read_text())[: len(SHORT)] == ours(written)

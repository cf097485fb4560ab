"""What we write runs in vLLM without our plug-in: greedy tokens are those of our own loader. `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("vllm")

from moe_prism.jobs.compress import compress_model
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.split import split_model
from moe_prism.model import load_model, load_tokenizer
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.compress import CompressOptions
from moe_prism.options.prune import PruneOptions
from moe_prism.options.split import SplitOptions
from moe_prism.serve.vllm import compat
from tests.vllm.prompts import NEW_TOKENS, SHORT

CALIBRATION = CalibrateOptions(tokens=4096)
WAYS: dict[str, tuple[str, PruneOptions | CompressOptions | SplitOptions]] = {
    "narrower": ("nano", CompressOptions(method="heapr", keep=0.75, calibration=CALIBRATION)),
    "zeros in place": ("nano", CompressOptions(method="heapr", keep=0.75, widths="own", calibration=CALIBRATION)),
    "merged in place": ("nano", CompressOptions(method="sub-moe", keep=0.75, calibration=CALIBRATION)),
    "fewer experts, neurons handed on": ("nano", CompressOptions(method="dern", keep=0.75, calibration=CALIBRATION)),
    "sparse": ("nano", CompressOptions(method="stun", keep=0.5, calibration=CALIBRATION)),
    "split": ("dense", SplitOptions(experts=8, calibration=CALIBRATION)),
    "removed": ("nano", PruneOptions(criterion="easy-ep", keep=0.75, calibration=CALIBRATION)),
    "constant": ("nano", PruneOptions(criterion="mone", keep=0.75, allocation="global", calibration=CALIBRATION)),
    "constant of an elastic folder": ("elastic", PruneOptions(criterion="mone", keep=0.75, calibration=CALIBRATION)),
}


def dense(folder: Path) -> Path:
    """A random dense model with nano's tokenizer, of shapes that vLLM's attention takes."""
    config = Qwen2Config(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the library's start is so small that no token stands out
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    load_tokenizer("nano").save_pretrained(folder)
    return folder


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
    if isinstance(options, SplitOptions):
        split_model(dense(out.parent / "dense"), out, options)
    elif isinstance(options, CompressOptions):
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

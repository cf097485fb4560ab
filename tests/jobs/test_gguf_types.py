"""Every type that `gguf` dequantizes is read; experts in such a type are adopted."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import moe_prism
from moe_prism.jobs.adopt import adopt
from moe_prism.jobs.inspect import inspect_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.model import find_layers, load_model
from moe_prism.options.adopt import AdoptOptions
from tests.tiers import by_night
from tests.tiny_sources import save_tiny

from .gguf_files import random_blocks, write_gguf

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not find_spec("accelerate"), reason="transformers reads GGUF files with the package accelerate")

KINDS = sorted(kind.name for kind in gguf.quants._type_traits if kind.name != "BF16")
ADOPTED = ("Q4_K", "Q6_K", "IQ4_XS")  # what llama-quantize is used for most
HIDDEN, WIDTH, EXPERTS = 256, 32, 4


def values(blocks, kind):
    return torch.from_numpy(gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind)).astype(np.float32))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "source"
    save_tiny(
        "qwen3_moe", folder, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, head_dim=16, num_hidden_layers=1, vocab_size=4096
    )
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_is_read(source, tmp_path, kind):
    names = {f"blk.0.ffn_{part}_exps.weight": seed for seed, part in enumerate(("gate", "up"))}
    blocks = {name: random_blocks(kind, (EXPERTS, WIDTH, HIDDEN), seed) for name, seed in names.items()}
    write_gguf(source, tmp_path / "some.gguf", "Q8_0", {name: (data, kind) for name, data in blocks.items()})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())  # what the file does not say
    layer = find_layers(load_model(tmp_path / "some.gguf", torch.float32))[0]
    gate, up = (values(data, kind).reshape(EXPERTS, WIDTH, HIDDEN) for data in blocks.values())
    assert torch.equal(layer.gate, gate) and torch.equal(layer.up, up)


@pytest.mark.parametrize("kind", by_night(ADOPTED, "Q4_K"))
def test_experts_in_such_a_type_are_adopted(source, tmp_path, tiny_calibration, kind):
    """Rows of gate and up are random blocks of the type: an elastic folder has the same rows in another order, so nothing is quantized."""
    plain = load_model(source, torch.float32)
    module = find_layers(plain)[0].module
    blocks = [random_blocks(kind, (EXPERTS, WIDTH, HIDDEN), seed) for seed in (0, 1)]
    rows = torch.cat([values(data, kind).reshape(EXPERTS, WIDTH, HIDDEN) for data in blocks], 1)
    with torch.no_grad():
        module.gate_up_proj.copy_(rows)
    plain.save_pretrained(tmp_path / "plain")
    for file in source.glob("tokenizer*"):
        (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    how = RefactorOptions(n_sub=2, profile_tokens=0, calibration=replace(tiny_calibration, tokens=512))
    refactor(tmp_path / "plain", tmp_path / "elastic", how)
    moved = find_layers(load_model(tmp_path / "elastic", torch.float32))[0]
    given = {}
    for name, data, old, new in zip(("gate", "up"), blocks, rows.chunk(2, 1), (moved.gate, moved.up), strict=True):
        place = [[int((old[e] == row).all(1).nonzero()[0]) for row in new[e]] for e in range(EXPERTS)]
        stored = data.reshape(EXPERTS, WIDTH, -1)
        given[f"blk.0.ffn_{name}_exps.weight"] = (np.stack([stored[e][place[e]] for e in range(EXPERTS)]), kind)
    write_gguf(tmp_path / "elastic", tmp_path / "some.gguf", "Q8_0", given)
    done = adopt(tmp_path / "some.gguf", tmp_path / "elastic", tmp_path / "out", AdoptOptions(tokens=512))
    facts = json.loads((done.folder / "prism.json").read_text())
    assert moe_prism.verify(done.folder) and facts["adopted"]["format"] == "gguf"
    assert 0 <= facts["adopted"]["kl"] < 0.1 and inspect_model(done.folder / "some.gguf")["layers"][0]["experts"] == EXPERTS

"""Families as they are released, on disk, through the commands: all of them in `make test-all`, one in `make test`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism.errors import UsageError
from moe_prism.jobs.inspect import inspect_model

from . import release, table
from .families import names

AT_LEAST = 50


@pytest.mark.slow
@pytest.mark.parametrize("family", names())
def test_the_released_form_works(family, tmp_path, text_file):
    works, word, _ = release.REFUSED.get(family, ("everything", "", ""))
    if works == "everything":
        release.check_release(family, tmp_path, str(text_file))
    elif word:
        release.save_release(family, tmp_path / "source")
        with pytest.raises(UsageError, match=word):
            steps(family, works, tmp_path, str(text_file))


def steps(family, works, folder, text):
    inspect_model(folder / "source")
    if works == "inspect":
        release.check_refactor(family, folder / "source", folder / "elastic", text)
    release.check_prune(family, folder / "source", folder / "pruned")


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, (works, _, _) in release.REFUSED.items() if works == "refactor"])
def test_what_cannot_be_pruned_is_refactored(family, tmp_path, text_file):
    release.save_release(family, tmp_path / "source")
    release.check_refactor(family, tmp_path / "source", tmp_path / "elastic", str(text_file))


def test_experts_stored_the_other_way_round(tmp_path, text_file):
    """Qwen3-VL-MoE was published with [in, out] matrices; transformers tells by the shape and saves [out, in]."""
    source, out = tmp_path / "source", tmp_path / "elastic"
    release.save_release("qwen3_vl_moe", source, moe_intermediate_size=24)
    tensors = load_file(source / "model.safetensors")
    turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()}
    save_file(turned, source / "model.safetensors", {"format": "pt"})
    release.check_refactor("qwen3_vl_moe", source, out, str(text_file))
    assert {name: t.shape for name, t in load_file(out / "model.safetensors").items()} == {n: t.shape for n, t in turned.items()}
    release.check_prune("qwen3_vl_moe", source, tmp_path / "pruned")
    name = next(name for name in turned if name.endswith("down_proj"))
    pruned = load_file(tmp_path / "pruned" / "model.safetensors")[name]
    assert pruned.shape == (4, 24, 32)
    assert any(torch.equal(pruned[0], expert) for expert in turned[name])
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["text_config"]["num_local_experts"] == 4


@pytest.mark.slow
def test_enough_families_work_and_the_document_says_which():
    working = set(names()) - set(release.REFUSED)
    assert len(working) >= AT_LEAST
    assert set(release.REFUSED) <= set(names())
    assert table.release_section() in table.PATH.read_text("utf-8")

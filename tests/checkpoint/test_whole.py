"""A source that is not whole is refused in one line before anything starts; one that only looks odd is taken."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism import cli
from moe_prism.checkpoint import LayerStream, OutputFolder, write_manifest
from moe_prism.checkpoint import whole as checks
from moe_prism.checkpoint.whole import look
from moe_prism.errors import CorruptError, PrismError
from moe_prism.jobs.inspect import inspect_model
from moe_prism.jobs.verify import verify
from moe_prism.model import load_model
from tests.faults.mutations import sign
from tests.tiny_sources import MANIFEST_FACTS

from .damage import DAMAGES, HEAD, INDEX, NORM, change, index_of, lost, write_index
from .tiny import load, logits, save


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    save("qwen3_moe", folder)
    return folder


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "source")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_naming_tensor_and_file(damage, source):
    tensor, file = DAMAGES[damage](source)
    for opened in (inspect_model, load_model):
        with pytest.raises(PrismError) as caught:
            opened(source)
        line = str(caught.value)
        assert tensor in line and file in line and "\n" not in line and len(line) < 500, line
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_passes_verify(damage, whole, tmp_path):
    """Also where the manifest was made after the damage: then only headers, values and the architecture can tell."""
    shutil.copytree(whole, tmp_path / "out")
    DAMAGES[damage](tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "out").rmdir()
    with OutputFolder(tmp_path / "out") as out:
        for file in [p for p in tmp_path.iterdir() if p.is_file()]:
            out.write_bytes(file.name, file.read_bytes()) if file.name != "out.lock" else None
        write_manifest(out, MANIFEST_FACTS)
        out.finish()
    with pytest.raises(CorruptError):
        verify(tmp_path / "out")


COMMANDS = {
    "inspect": ("inspect", "{source}"),
    "calibrate": ("calibrate", "{source}", "-o", "{out}"),
    "refactor": ("refactor", "{source}", "-o", "{out}"),
    "dry run": ("refactor", "{source}", "-o", "{out}", "--dry-run"),
    "low memory": ("refactor", "{source}", "-o", "{out}", "--low-memory"),
    "prune": ("prune", "{source}", "-o", "{out}"),
    "report only": ("prune", "{source}", "--report-only"),
    "skip": ("skip", "{source}", "-o", "{out}"),
    "frontier": ("frontier", "{source}", "-o", "{out}"),
    "trace": ("trace", "{source}", "-o", "{out}"),
}
ELASTIC = {
    "frontier": ("frontier", "{source}", "-o", "{out}"),
    "generate": ("generate", "{source}", "--prompt", "x"),
    "from the store": ("generate", "{source}", "--prompt", "x", "--expert-memory", "1MB"),
    "serve": ("serve", "{source}"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_it_starts(command, source, tmp_path, capsys):
    lost(HEAD)(source)
    words = [part.format(source=source, out=tmp_path / "result") for part in COMMANDS[command]]
    assert cli.main(words) == 4
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and f"tensor '{HEAD}' is missing" in err and not out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("command", ELASTIC)
def test_every_command_that_runs_an_elastic_model_refuses(command, elastic_tiny, tmp_path, capsys):
    source = shutil.copytree(elastic_tiny, tmp_path / "source")
    change(source, HEAD, lambda tensors: tensors.pop(HEAD))
    words = [part.format(source=source, out=tmp_path / "result") for part in ELASTIC[command]]
    assert cli.main(words) == 4
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and f"tensor '{HEAD}' is missing" in err and not out


def test_extra_tensors_are_listed_and_kept(source, capsys):
    change(source, NORM, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert inspect_model(source)["unread_tensors"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert cli.main(["inspect", str(source)]) == 0
    assert "1 tensor that this model does not read: model.layers.0.self_attn.rotary_emb.inv_freq" in capsys.readouterr().out


def test_tied_heads_are_whole_with_and_without_one(tmp_path):
    model = save("llama", tmp_path)
    assert HEAD not in index_of(tmp_path)
    LayerStream(tmp_path)
    change(tmp_path, NORM, lambda tensors: tensors.update({HEAD: model.lm_head.weight.detach().clone()}))
    LayerStream(tmp_path)
    embedding = "model.embed_tokens.weight"
    lost(embedding)(tmp_path)  # transformers ties it the other way round
    assert torch.equal(logits(load_model(tmp_path)), logits(load(tmp_path)))


def test_an_overlay_counts_in_what_is_written(source, tmp_path):
    """A shard laid over the others holds a matrix of an expert and one of attention again: the new values travel."""
    from tests.checkpoint.test_rewrite import run

    names = ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    weight_map = index_of(source)
    over = {name: load_file(source / weight_map[name])[name] * 2 for name in names}
    save_file(over, source / "model-overlay.safetensors", {"format": "pt"})
    write_index(source, weight_map | dict.fromkeys(names, "model-overlay.safetensors"))
    expected = logits(load(source))
    run(source, tmp_path / "out")
    written = logits(load(tmp_path / "out"))
    assert (written - expected).abs().max() < 1e-5 * expected.abs().max()
    old = load_file(tmp_path / "out" / weight_map[names[1]])[names[1]]
    assert torch.equal(old * 2, over[names[1]])  # the copy that nobody reads stays what it was


def test_a_stale_index_beside_a_whole_file_does_not_matter(tmp_path):
    save("olmoe", tmp_path, shard="1GB")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    LayerStream(tmp_path)


def test_verify_looks_at_the_architecture(whole, tmp_path):
    from tests.checkpoint.test_rewrite import run

    folder = tmp_path / "out"
    run(whole, folder)
    assert any(check.name == "architecture" for check in verify(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    sign(folder, "config.json")
    with pytest.raises(CorruptError, match=r"gate\.weight' is \[4, 32\], config\.json says \[3, 32\]|experts\.3\."):
        verify(folder)


def test_what_passed_is_looked_at_again_once_it_changed(source, monkeypatch):
    look(source)
    with monkeypatch.context() as patched:
        patched.setattr(checks, "open_whole", lambda _: pytest.fail("looked at what is as it was"))
        look(source)
    shard = min(source.glob("*.safetensors"))
    data, then = shard.read_bytes(), shard.stat()
    shard.write_bytes(data[:-8] + b"\xff" * 8)
    os.utime(shard, ns=(then.st_atime_ns, then.st_mtime_ns))  # as a tool that restores times leaves it
    seen = []
    monkeypatch.setattr(checks, "open_whole", seen.append)
    look(source)
    shard.unlink()
    look(source)
    assert len(seen) == 2

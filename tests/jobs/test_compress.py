"""A checkpoint with its experts in fewer bits: what it says, what it decodes to, and what cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_prism.artefact.load import elastic_manifest
from moe_prism.artefact.open import open_model
from moe_prism.checkpoint import LayerStream, verify
from moe_prism.cli import main
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.prepare import origins
from moe_prism.compress.quantize.smoothed import SmoothChange
from moe_prism.errors import UsageError
from moe_prism.jobs.compress import compress_model, measure_compression, plan_compression
from moe_prism.model import find_layers
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.compress import CompressOptions
from moe_prism.store import open_pack
from tests.compress.tiny import save


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        num_experts=4, num_experts_per_tok=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("compress") / "source"
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # channels of some are louder than those of others
            layer.post_attention_layernorm.weight.copy_(torch.exp2(2 * torch.randn(64)))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


METHODS = {
    "rtn:bits=4:group=32": (Rtn(), 4, 32),
    "rtn:bits=8:group=32": (Rtn(), 8, 32),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_the_decoded_model(source, tmp_path, method):
    out = tmp_path / "out"
    result = compress_model(source, out, CompressOptions(method=method))
    codec, bits, group = METHODS[method]
    before, after = open_model(source), open_model(out)
    ids = torch.arange(40)[None] % 61
    layers = find_layers(before.model)
    change = QuantizeChange(codec, float(bits), group)
    with torch.no_grad(), change.installed(before.model, layers):
        wanted = before.model(input_ids=ids).logits
    with torch.no_grad():
        found = after.model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    assert float((found - wanted).square().mean()) < 1e-3 * float(wanted.square().mean())
    assert all(check.detail for check in verify(out))
    shards = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    source_size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    planned = result.expert_bytes
    assert abs((source_size - shards) - (planned[0] - planned[1])) < 0.02 * source_size + 24_000  # headers are longer
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["weights"]["num_bits"] == bits and "lm_head" in settings["ignore"]
    assert not any("experts" in name for name in settings["ignore"])


def test_a_plan_reads_nothing_and_a_report_measures(source, tmp_path):
    options = CompressOptions(method="rtn:bits=4:group=32")
    plan, report = plan_compression(source, options), measure_compression(source, options)
    assert plan.relative_error is None and plan.expert_bytes == report.expert_bytes and plan.experts == report.experts == 24
    assert 0 < report.relative_error < 0.02
    assert plan.expert_bytes[1] < 0.32 * plan.expert_bytes[0]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_ends_in_the_same_bytes(source, tmp_path):
    options = CompressOptions(method="rtn:bits=4:group=32")
    compress_model(source, tmp_path / "whole", options)

    def report(_name):
        raise KeyboardInterrupt

    class Stopped:
        def __init__(self, stage):
            self.stage = stage

        def __enter__(self):
            def update(done, _total):
                if done == 2:
                    raise KeyboardInterrupt

            return update

        def __exit__(self, *_):
            return None

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, tmp_path / "again", options, report=Stopped)
    assert not (tmp_path / "again").exists()
    compress_model(source, tmp_path / "again", options, resume=True)
    for file in (tmp_path / "whole").iterdir():
        if file.name != "prism.json":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert compress_model(source, tmp_path / "again", options, resume=True).manifest["kind"] == "quantized"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("nested", "has no form"),
        ("product", "has no form"),
        ("rtn", "does not say how many bits"),
        ("rtn:bits=3", "packs no 3 bits"),
        ("rtn:bits=4:group=32:symmetric=false", "reads no zeros"),
        ("rtn:bits=4:group=128", "are no groups of 128"),
        ("rtn:bits=4:group=48", "inputs per group"),
        ("rtn:colour=1", "sets nothing"),
    ],
)
def test_what_cannot_be_written_is_refused(source, method, words):
    with pytest.raises(UsageError, match=words):
        plan_compression(source, CompressOptions(method=method))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Text in the source's vocabulary."""
    g = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("words") / "text.txt"
    path.write_text("\n\n".join(" ".join(map(str, torch.randint(1, 60, (40,), generator=g).tolist())) for _ in range(120)))
    return path


def calibrated(words, **more):
    return CompressOptions(calibration=CalibrateOptions(text=str(words), tokens=512, length=32), **more)


def outputs(folder, ids):
    with torch.no_grad():
        return open_model(folder).model(input_ids=ids).logits


def test_what_is_written_of_evened_out_experts_is_what_the_point_runs(source, words, tmp_path):
    """The point of the same vectors, decoded in memory: norm, router and experts are scaled, and packed as they are there."""
    out, ids = tmp_path / "out", torch.arange(40)[None] % 61
    result = compress_model(source, out, calibrated(words, method="eaquant:bits=4:group=32"))
    before = open_model(source)
    layers = find_layers(before.model)
    written = {}
    for file in out.glob("*.safetensors"):
        written |= load_file(file)
    rows = []
    for i in range(len(layers)):
        name = f"model.layers.{i}.post_attention_layernorm.weight"
        own = before.model.get_parameter(name) / written[name].float()
        assert torch.equal(own, 2.0 ** own.log2().round())
        rows.append(tuple(own.log2().int().tolist()))
    assert any(any(row) for row in rows)
    change = SmoothChange(QuantizeChange(Rtn(), 4.0, 32), tuple(rows))
    with torch.no_grad(), change.installed(before.model, layers):
        wanted = before.model(input_ids=ids).logits
    torch.testing.assert_close(outputs(out, ids), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert result.manifest["documents"] and all(check.detail for check in verify(out))


def test_errors_that_are_fed_back_move_the_outputs_less(source, words, tmp_path):
    ids = torch.tensor([list(map(int, line.split())) for line in words.read_text().split("\n\n")[:16]])
    wanted, lost = outputs(source, ids), {}
    plain = CompressOptions(method="rtn:bits=4:group=32")
    feeding = calibrated(words, method="rtn:bits=4:group=32", error_feedback=True)
    for name, options in (("plain", plain), ("fed back", feeding)):
        compress_model(source, tmp_path / name, options)
        lost[name] = float((outputs(tmp_path / name, ids) - wanted).square().mean())
    assert lost["fed back"] < 0.9 * lost["plain"]
    moved = [measure_compression(source, own).relative_error for own in (plain, feeding)]
    assert moved[1] > moved[0]  # the weights move further


@pytest.mark.parametrize("kind", ["softmax", "top-k-softmax", "sigmoid-bias"])
def test_every_matrix_on_disk_is_known_by_its_expert(kind, tmp_path):
    save(kind, tmp_path)
    stream = LayerStream(tmp_path, torch.float32)
    layers = find_layers(stream.model)
    found = origins(stream, layers)
    routed = [layer for layer in layers if not layer.is_dense]
    assert len(found) >= 3 * sum(layer.num_experts for layer in routed)
    for name, origin in list(found.items())[::7]:
        layer = layers[origin.layer]
        with stream.module(layer.owners[0] if len(layer.owners) == 1 else layer.block_name):
            view = (layer.gate, layer.up, layer.down)[origin.matrix][origin.expert]
            assert torch.equal(stream.source.tensor(name).float(), view)


EDITS = """edits:
  - prune:
      criterion: random
      keep: 0.5
  - quantize:
      method: rtn:bits=4:group=32
"""


def test_a_chain_of_edits_runs_each_on_the_one_before_and_is_on_record(source, tmp_path, capsys):
    file, out = tmp_path / "edits.yaml", tmp_path / "out"
    file.write_text(EDITS)
    words = ["compress", str(source), "--recipe", str(file), "-o", str(out)]
    assert main([*words, "--dry-run"]) == 0 and not out.exists()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["prune", "compress"] and f"{out}.edit-1" in said[1]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edits.yaml", "out"]
    manifest = json.loads((out / "prism.json").read_text())
    assert manifest["kind"] == "quantized" and [next(iter(step)) for step in manifest["recipe"]["steps"]] == ["prune", "compress"]
    assert manifest["recipe"]["steps"][0]["prune"]["keep"] == 0.5
    assert json.loads((out / "config.json").read_text())["num_experts"] == 2 and all(check.detail for check in verify(out))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("keep: 0.5", "keeep: 0.5", "edits.yaml:4: prune has no 'keeep'; did you mean 'keep'?"),
        ("keep: 0.5", "keep: 5", "edits.yaml:4: prune keep: "),
        ("quantize:", "quantise:", "edits.yaml:5: no step 'quantise'; did you mean 'quantize'?"),
        ("criterion: random", "out: elsewhere", "edits.yaml:3: prune has no 'out' in a chain"),
        ("edits:", "steps:", "edits.yaml:1: a recipe of edits has no 'steps'"),
    ],
)
def test_what_is_wrong_in_a_chain_is_named_with_its_line(source, tmp_path, capsys, old, new, said):
    file = tmp_path / "edits.yaml"
    file.write_text(EDITS.replace(old, new))
    assert main(["compress", str(source), "--recipe", str(file), "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["edits.yaml"]


def test_records_are_what_the_store_reads(elastic_tiny, tmp_path):
    file, asked = tmp_path / "experts.pack", CompressOptions(method="int8-rows", format="records")
    done = compress_model(elastic_tiny, file, asked)
    assert plan_compression(elastic_tiny, asked).expert_bytes == done.expert_bytes and done.expert_bytes[0] > 0
    pack = open_pack(file, elastic_manifest(elastic_tiny))
    assert pack.has_low and len(pack.space) == done.experts
    with pytest.raises(UsageError, match="exists already"):
        compress_model(elastic_tiny, file, asked)
    compress_model(elastic_tiny, file, asked, force=True)
    for wrong, words in (
        (CompressOptions(format="records"), "has no form in records"),
        (asked, "has no prism.json"),
    ):
        with pytest.raises(UsageError, match=words):
            compress_model(elastic_tiny if wrong is not asked else tmp_path, tmp_path / "other", wrong)

"""A checkpoint without some of its neurons: what is written is what was run in memory, in unmodified transformers."""

from __future__ import annotations

import json

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.checkpoint import verify
from moe_prism.compress.changes import change_of
from moe_prism.errors import UsageError
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.compress import compress_model, measure_compression, plan_compression
from moe_prism.model import find_layers
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.compress import CompressOptions
from moe_prism.point import find_point
from tests.compress.tiny import load, logits, relative, save
from tests.tiny_sources import save_tiny

ALIKE = ("softmax-normalised", "top-k-softmax", "group-sigmoid")  # in how experts are stored
FAMILIES = ("softmax", "router-bias", "sigmoid-bias", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALIKE))
SHARED = {"sigmoid-bias", "group-sigmoid"}  # their shared expert takes its width from the same number


def asked(**more) -> CompressOptions:
    return CompressOptions(**{"method": "magnitude", "keep": 0.5, "multiple": 4 if more.get("widths") != "own" else 16} | more)


def in_memory(source, out):
    """Logits of the source at the point that the output says, and what that is."""
    model = load(source)
    point = find_point(str(out / "point.json")).point
    with change_of(point.weights).installed(model, find_layers(model)):
        return logits(model), change_of(point.weights)


@pytest.mark.parametrize("widths", ["equal", "own"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_written_is_what_was_run(kind, widths, tmp_path):
    save(kind, tmp_path / "source")
    options, out = asked(widths=widths), tmp_path / "out"
    if widths == "equal" and kind in SHARED:
        with pytest.raises(UsageError, match=r"shared_experts.*changes with 'moe_intermediate_size' as well"):
            compress_model(tmp_path / "source", out, options)
        assert not out.exists()
        return
    done = compress_model(tmp_path / "source", out, options)
    wanted, change = in_memory(tmp_path / "source", out)
    assert relative(logits(load(out)), wanted) < 1e-5
    assert relative(wanted, logits(load(tmp_path / "source"))) > 1e-3
    before, after = done.expert_bytes
    size = sum(p.nbytes for layer in find_layers(load(out)) for p in layer.module.parameters())
    assert size == after and (after == before if widths == "own" else after < 0.53 * before)
    assert done.facts["share"] == change.resident_share == 0.5
    assert all(check.detail for check in verify(out))
    assert plan_compression(tmp_path / "source", options).expert_bytes == (before, after)
    again = compress_model(tmp_path / "source", out, options, resume=True)
    assert again.manifest["kind"] == "sliced" and again.facts == json.loads(json.dumps(done.facts))


def test_a_dense_model_is_sliced_too(tiny_dense, tmp_path):
    compress_model(tiny_dense, tmp_path / "out", asked(multiple=8))
    wide, narrow = load(tiny_dense), load(tmp_path / "out")
    assert narrow.config.intermediate_size * 2 == wide.config.intermediate_size
    wanted, _ = in_memory(tiny_dense, tmp_path / "out")
    assert relative(logits(narrow), wanted) < 1e-5


def test_interrupted_it_ends_in_the_same_bytes(tmp_path):
    save("softmax", tmp_path / "source")
    compress_model(tmp_path / "source", tmp_path / "whole", asked())

    class Stopped:
        def __init__(self, stage):
            self.stage = stage

        def __enter__(self):
            def update(done, _total):
                if self.stage == "write":
                    raise KeyboardInterrupt

            return update

        def __exit__(self, *_):
            return None

    with pytest.raises(KeyboardInterrupt):
        compress_model(tmp_path / "source", tmp_path / "again", asked(), report=Stopped)
    assert not (tmp_path / "again").exists()
    compress_model(tmp_path / "source", tmp_path / "again", asked(), resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.fixture(scope="module")
def statistics(tiny_source, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("slice") / "statistics"
    names = ["neurons", "gradients", "outputs"]
    calibrate_model(tiny_source, out, CalibrateOptions(text=str(text_file), tokens=512, length=32, collectors=names))
    return out


@pytest.mark.parametrize("method", ["heapr", "camera", "slim", "wanda"])
def test_one_calibration_serves_every_method(tiny_source, statistics, tmp_path, method):
    free = f"{method}:scope=layer" if method == "slim" else method
    own = asked(method=free, widths="own", protect=["super-experts"], pin=["1:3"])
    found = compress_model(tiny_source, tmp_path / "out", own, calibration=statistics)
    change = change_of(find_point(str(tmp_path / "out" / "point.json")).point.weights)
    assert change.kept[1].mask()[3].all() and abs(change.resident_share - 0.5) < 0.01
    assert found.facts["least_tokens"] >= 0 and 0 < found.facts["score_lost"] < 0.5
    report = measure_compression(tiny_source, asked(method=method), calibration=statistics)
    assert report.facts["width"] * 2 == report.facts["of"] and report.folder is None
    assert report.facts["score_lost"] >= report.facts["score_lost_by_the_method_alone"] or method != "slim"


def test_the_pass_it_runs_is_the_one_that_calibrate_runs(tiny_source, statistics, text_file, tmp_path):
    text = CalibrateOptions(text=str(text_file), tokens=512, length=32)
    options = asked(method="heapr", calibration=text)
    compress_model(tiny_source, tmp_path / "own", options)
    compress_model(tiny_source, tmp_path / "given", asked(method="heapr"), calibration=statistics)
    points = [find_point(str(tmp_path / name / "point.json")).point for name in ("own", "given")]
    assert points[0] == points[1]
    with torch.no_grad():
        opened = open_model(tmp_path / "own")
        assert opened.elastic.layers[0].parts.layer.width * 2 == find_layers(load(tiny_source))[0].width


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": None}, "does not say how many neurons stay; add --keep 0.75"),
        ({"method": "heapr:0.5"}, "both --keep 0.5 and 'heapr:0.5'"),
        ({"method": "magnitude:scope=layer"}, "says how wide experts are; add --widths own"),
        ({"pin": ["0:1"]}, "with --widths equal all experts lose as many"),
        ({"widths": "own", "pin": ["0:99"]}, "there is no expert 0:99"),
        ({"widths": "own", "pin": ["one"]}, "--pin 'one' names no expert"),
        ({"multiple": 4096}, "multiples of 4096"),
        ({"keep": 0.0}, "--keep 0 is out of range"),
        ({"method": "rtn:bits=8"}, "--keep means nothing to 'rtn:bits=8'"),
        ({"calibration": CalibrateOptions(tokens=512)}, "'magnitude' reads no text"),
        ({"method": "pmq", "keep": None}, "'pmq' has no form in compressed-tensors"),
        ({"method": "camera:alpha=2"}, "alpha=2 of"),
        ({"method": "heapr:by=love"}, "has no by=love"),
        ({"method": "slim:scope=town"}, "has no scope 'town'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_source, tmp_path, options, words):
    with pytest.raises(UsageError) as refused:
        compress_model(tiny_source, tmp_path / "out", asked(**{"multiple": 16, **options}))
    assert words in f"{refused.value.cause}; {refused.value.next_step}"


def test_an_elastic_folder_and_another_calibration_are_refused(elastic_tiny, statistics, tmp_path):
    with pytest.raises(UsageError, match="in the order of its sub-experts"):
        compress_model(elastic_tiny, tmp_path / "out", asked())
    save_tiny("olmoe", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "other" / "config.json").read_text() + " ")
    with pytest.raises(UsageError, match="calibrated on another checkpoint"):
        compress_model(tmp_path / "other", tmp_path / "out", asked(method="heapr"), calibration=statistics)

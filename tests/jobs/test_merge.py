"""A checkpoint with merged experts: what is written is what was run in memory, in unmodified transformers."""

from __future__ import annotations

import json

import pytest

from moe_prism.checkpoint import verify
from moe_prism.compress.changes import change_of
from moe_prism.errors import UsageError
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.compress import compress_model, measure_compression, plan_compression
from moe_prism.model import find_layers
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.compress import CompressOptions
from moe_prism.point import find_point
from tests.compress.tiny import load, logits, relative
from tests.tiers import by_night

COLLECTORS = ["counts", "pairs", "grams", "outputs", "neurons", "inputs"]
REMOVING = ("dern:threshold=0", "stun:drop=0.5")
IN_PLACE = ("m-smoe", "mc-smoe", "sub-moe", "sub-moe:thin=0.5")


@pytest.fixture(scope="module")
def statistics(tiny_source, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "statistics"
    calibrate_model(tiny_source, out, CalibrateOptions(text=str(text_file), tokens=512, length=32, collectors=COLLECTORS))
    return out


def asked(**more) -> CompressOptions:
    return CompressOptions(**{"method": "dern:threshold=0", "keep": 0.5} | more)


@pytest.mark.parametrize("method", by_night([*REMOVING, *IN_PLACE], REMOVING[0], IN_PLACE[0]))
def test_what_is_written_is_what_was_run(tiny_source, statistics, tmp_path, method):
    options, out = asked(method=method), tmp_path / "out"
    done = compress_model(tiny_source, out, options, calibration=statistics)
    source, written = load(tiny_source), load(out)
    change = change_of(find_point(str(out / "point.json")).point.weights)
    before = logits(source)
    with change.installed(source, find_layers(source)):
        wanted = logits(source)
    assert relative(logits(written), wanted) < 1e-5 and relative(wanted, before) > 1e-3
    experts = [layer.num_experts for layer in find_layers(source)]
    left = [layer.num_experts for layer in find_layers(written)]
    assert left == ([n // 2 for n in experts] if method in REMOVING else experts)
    size = sum(p.nbytes for layer in find_layers(written) for p in layer.module.parameters())
    assert done.expert_bytes[1] == size and done.facts["stored_once"] == change.resident_share
    assert all(check.detail for check in verify(out))
    assert plan_compression(tiny_source, options, calibration=statistics).expert_bytes == done.expert_bytes
    again = compress_model(tiny_source, out, options, calibration=statistics, resume=True)
    assert again.manifest["kind"] == "merged" and again.facts == json.loads(json.dumps(done.facts))


def test_the_pass_it_runs_is_the_one_that_calibrate_runs(tiny_source, statistics, text_file, tmp_path):
    text = CalibrateOptions(text=str(text_file), tokens=512, length=32)
    compress_model(tiny_source, tmp_path / "own", asked(calibration=text))
    compress_model(tiny_source, tmp_path / "given", asked(), calibration=statistics)
    points = [find_point(str(tmp_path / name / "point.json")).point for name in ("own", "given")]
    assert points[0] == points[1]


@pytest.mark.parametrize("method", [*REMOVING, *IN_PLACE])
def test_what_is_pinned_stays_as_it_is(tiny_source, statistics, tmp_path, method):
    options = asked(method=method, pin=["0:2", "1:3"], protect=["super-experts"])
    found = compress_model(tiny_source, tmp_path / "out", options, calibration=statistics)
    change = change_of(find_point(str(tmp_path / "out" / "point.json")).point.weights)
    assert found.facts["protected"] >= 2
    for layer, expert in ((0, 2), (1, 3)):
        if method in REMOVING:
            assert expert in change.staying[layer].kept
        else:
            merged = change.parts[0] if method == "mc-smoe" else getattr(change, "merged", change)
            assert merged.layers[layer].groups.count(expert) == 1
    report = measure_compression(tiny_source, options, calibration=statistics)
    assert report.folder is None and report.facts == found.facts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": None}, "does not say how many experts stay; add --keep 0.75"),
        ({"method": "dern:0.5"}, "both --keep 0.5 and 'dern:0.5'"),
        ({"keep": 0.01}, "a token uses"),
        ({"pin": ["0:99"]}, "there is no expert 0:99"),
        ({"widths": "own"}, "--widths means nothing to 'dern:threshold=0'"),
        ({"error_feedback": True}, "--error-feedback means nothing to 'dern:threshold=0'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_source, tmp_path, options, words):
    with pytest.raises(UsageError) as refused:
        compress_model(tiny_source, tmp_path / "out", asked(**options))
    assert words in f"{refused.value.cause}; {refused.value.next_step}" and not (tmp_path / "out").exists()

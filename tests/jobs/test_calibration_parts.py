"""Statistics of parts of a text, added up, are those of one pass: samples and counts to the byte, sums of fractions to their rounding."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moe_prism.calibrate import collectors
from moe_prism.checkpoint import read_manifest
from moe_prism.cli import main
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs import calibrate_ranks
from moe_prism.jobs.calibrate import calibrate_model, calibrate_part, read_statistics
from moe_prism.jobs.join_calibrations import join_calibrations
from moe_prism.jobs.refactor import RefactorOptions, refactor
from tests.ranks import run_ranks
from tests.tiny_sources import digests

ADDED = 1e-6
"""How far sums of fractions may be apart, relative to their norm: each part rounds its own. So does `grams`, whose products are of as many
tokens at once as the sample has room for.
"""


@pytest.fixture(scope="module")
def options(tiny_calibration):
    return replace(tiny_calibration, tokens=4 * tiny_calibration.tokens)


@pytest.fixture(scope="module")
def parts(tiny_source, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    made = [folder / f"part{i}" for i in range(3)]
    for i, part in enumerate(made):
        calibrate_part(tiny_source, part, f"{i + 1}/3", options)
    return made


def same(one, other):
    """Whether two statistics are those of the same text; names of the tensors that are equal to the bit."""
    assert one.facts == other.facts and torch.equal(one.profile, other.profile)
    exact = set()
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        a, b = mine.flat(), theirs.flat()
        assert a.keys() == b.keys() and mine.name == theirs.name
        for name, tensor in a.items():
            if tensor.is_floating_point():
                apart = (tensor.double() - b[name].double()).norm()
                assert apart <= ADDED * tensor.double().norm(), f"{name}: {float(apart)}"
            else:
                assert torch.equal(tensor, b[name]), name
            if torch.equal(tensor, b[name]):
                exact.add(name)
    return exact


def test_parts_are_joined_in_any_order_and_refactor_to_the_same_bytes(tiny_source, options, parts, tmp_path):
    calibrate_model(tiny_source, tmp_path / "whole", options)
    join_calibrations(tiny_source, tmp_path / "joined", [parts[2], parts[0], parts[1]], options)
    exact = same(read_statistics(tmp_path / "whole"), read_statistics(tmp_path / "joined"))
    assert exact >= {"counts.count", "counts.tokens", "tokens.x", "tokens.key", "tokens.kept", "tokens.weight"}
    asked = RefactorOptions(calibration=options, profile_tokens=0)
    for name in ("whole", "joined"):
        refactor(tiny_source, tmp_path / f"{name}-out", asked, calibration=tmp_path / name)
    assert digests(tmp_path / "whole-out") == digests(tmp_path / "joined-out"), "it reads samples and counts"


@pytest.mark.parametrize("low_memory", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_collector_by_domains_too(tiny_source, options, text_file, tmp_path, low_memory):
    names = [name for name in collectors.names() if name != "gradients" or not low_memory]
    text = str(text_file)
    own = replace(options, text=None, domains=[f"a={text}", f"b={text}"], collectors=names, low_memory=low_memory)
    calibrate_model(tiny_source, tmp_path / "whole", own)
    made = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(made):
        calibrate_part(tiny_source, part, f"{i + 1}/2", own)
    join_calibrations(tiny_source, tmp_path / "joined", made, own)
    same(read_statistics(tmp_path / "whole"), read_statistics(tmp_path / "joined"))


def test_what_does_not_go_together_is_refused(tiny_source, options, parts, tmp_path):
    with pytest.raises(UsageError, match="part 2 of 3 of a calibration"):
        read_statistics(parts[1])
    for given, words in (
        ([], "no parts to join"),
        (parts[:2], "part 3 of 3 is missing"),
        ([*parts, parts[0]], "part 1 of 3, which does not go with"),
    ):
        with pytest.raises(UsageError, match=words):
            join_calibrations(tiny_source, tmp_path / "out", given, options)
    with pytest.raises(UsageError, match="other options"):
        join_calibrations(tiny_source, tmp_path / "out", parts, replace(options, seed=7))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("low_memory", [False, True])
def test_parts_of_a_text_of_one_batch(tiny_source, tiny_calibration, tmp_path, low_memory):
    few = replace(tiny_calibration, tokens=64, low_memory=low_memory)
    calibrate_model(tiny_source, tmp_path / "whole", few)
    made = [tmp_path / f"part{i}" for i in range(2)]
    for i, part in enumerate(made):
        calibrate_part(tiny_source, part, f"{i + 1}/2", few)
    join_calibrations(tiny_source, tmp_path / "joined", made, few)
    same(read_statistics(tmp_path / "whole"), read_statistics(tmp_path / "joined"))


def test_a_part_that_was_changed_is_refused(tiny_source, options, tmp_path):
    part = tmp_path / "part"
    calibrate_part(tiny_source, part, "1/1", options)
    file = part / "layer-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError):
        join_calibrations(tiny_source, tmp_path / "out", [part], options)


def flags(options):
    return [
        "--text",
        options.text,
        "--tokens",
        str(options.tokens),
        "--length",
        str(options.length),
        "--reservoir",
        str(options.reservoir),
    ]


def test_the_commands(tiny_source, options, parts, tmp_path, capsys):
    asked = ["calibrate", str(tiny_source), *flags(options)]
    assert main([*asked, "-o", str(tmp_path / "part2"), "--shard", "2/3"]) == 0
    assert "--join" in capsys.readouterr().err
    assert read_manifest(tmp_path / "part2")["files"] == read_manifest(parts[1])["files"]
    joined = ",".join(map(str, (parts[0], tmp_path / "part2", parts[2])))
    assert main([*asked, "-o", str(tmp_path / "all"), "--join", joined, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == read_statistics(tmp_path / "all").facts["tokens"]
    assert main([*asked, "-o", str(tmp_path / "x"), "--shard", "1/2", "--join", "a"]) == 2


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}, 2),  # torchrun's own 1
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_processes_share_the_cores_of_their_machine(environment, threads, monkeypatch):
    monkeypatch.setattr(calibrate_ranks, "cores", lambda: 8)
    assert calibrate_ranks.own_threads(environment) == threads


@pytest.mark.slow
def test_torchrun_divides_the_pass(tiny_source, options, tmp_path):
    asked = ["calibrate", str(tiny_source), "-o", str(tmp_path / "out"), *flags(options)]
    run_ranks(*asked)
    calibrate_model(tiny_source, tmp_path / "alone", options)
    same(read_statistics(tmp_path / "out"), read_statistics(tmp_path / "alone"))
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" not in p.name) == ["alone", "out"]

"""Whole experts by whoever is faster: the same numbers, measured once, decided alike by every process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_prism.elastic import LayerParts
from moe_prism.elastic.execute import times
from moe_prism.elastic.execute.base import WholeCalls
from moe_prism.elastic.execute.memory import InMemory, auto
from moe_prism.elastic.execute.plain import reference
from moe_prism.errors import UsageError
from moe_prism.model import find_layers
from tests.parity.families import build

from .test_execute import batch, close


@pytest.fixture
def parts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(times, "_known", {})
    layer = find_layers(build("olmoe"))[0]
    layer.arrange()
    return LayerParts(layer, 4, 0)


def decided(monkeypatch, parts, found):
    """Have every size take `found`."""
    monkeypatch.setenv(times.CHOICE, "measure")
    monkeypatch.setattr(times, "measure", lambda *_: times.LayerTimes(*found))
    parts.times.clear()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_tiles_give_the_stock_layers_numbers(parts, monkeypatch, tokens):
    x, index, weight, _ = batch(parts, tokens, 2, tokens)
    monkeypatch.setenv(times.CHOICE, "stock")
    stock = InMemory(parts).whole(x, index, weight)
    assert torch.equal(stock, parts.layer.native(x, index, weight))
    monkeypatch.setenv(times.CHOICE, "tiles")
    tiles = InMemory(parts).whole(x, index, weight)
    assert (tiles - stock).norm() < 1e-6 * stock.norm()
    every = torch.ones(tokens, 2, 4, dtype=torch.bool)
    assert torch.equal(tiles, auto(parts, x, index, weight, every))  # as a token has them in a mixed batch


@torch.no_grad()
def test_the_faster_one_computes_the_full_budget(parts, monkeypatch):
    x, index, weight, _ = batch(parts, 8, 2, 0)
    stock = parts.layer.native(x, index, weight)
    decided(monkeypatch, parts, (1.0, 2.0, 1.5))
    assert torch.equal(InMemory(parts).whole(x, index, weight), stock)
    decided(monkeypatch, parts, (2.0, 1.0, 0.5))
    monkeypatch.setattr(parts.layer.__class__, "native", lambda *_: pytest.fail("the stock layer ran"))
    times._known.clear()
    (times._file()).unlink()
    close(InMemory(parts).whole(x, index, weight), stock)


@torch.no_grad()
@pytest.mark.parametrize(("found", "whole"), [((1.0, 4.0, 2.0), True), ((1.0, 1.2, 0.6), False), ((2.0, 1.0, 0.9), False)])
def test_a_budget_is_never_dearer_than_whole_experts(parts, monkeypatch, found, whole):
    x, index, weight, g = batch(parts, 8, 2, 1)
    keep = torch.rand(8, 2, 4, generator=g) < 0.5
    decided(monkeypatch, parts, found)
    tally = WholeCalls()
    close(auto(parts, x, index, weight, keep, tally), reference(parts, x, index, weight, keep))
    assert (tally.calls, tally.whole) == (1, int(whole))


def test_a_measurement_is_made_once_and_kept(parts, monkeypatch):
    monkeypatch.setenv(times.CHOICE, "measure")
    first = times.times_of(parts, 5, 2)
    assert min(first) > 0
    (name,) = json.loads(times._file().read_text())
    assert name.endswith("T4")
    monkeypatch.setattr(times, "measure", lambda *_: pytest.fail("measured again"))
    assert times.times_of(parts, 4, 2) is first
    parts.times.clear()
    times._known.clear()  # another process
    assert times.times_of(parts, 4, 2) == first


def test_the_first_process_decides(parts):
    mine, theirs = times.LayerTimes(1.0, 2.0, 3.0), times.LayerTimes(3.0, 2.0, 1.0)
    assert times._keep("name", theirs) == theirs
    assert times._keep("name", mine) == theirs
    times._file().write_text("[1]")
    assert times._keep("other", mine) == mine  # not ours, or damaged: as if it were missing


def test_a_large_layer_is_measured_by_a_part_of_it():
    assert times.Sample.of(32, 4, 8, 3 * 128 * 128) == (8, 32, 4)
    for tokens in (1, 8, 32, 256, 2048):
        count, experts, k = times.Sample.of(64, 8, tokens, 3 * 2048 * 1024)
        assert 0.5 < (count * k / experts) / (tokens * 8 / 64) < 2  # as many rows for an expert
        assert count * k * 3 * 2048 * 1024 <= 2 * times.SAMPLE_WORK


def test_an_unknown_word_is_refused(monkeypatch):
    monkeypatch.setenv(times.CHOICE, "fast")
    with pytest.raises(UsageError, match="MOE_PRISM_WHOLE is 'fast'"):
        times.forced()


ISA = """
import sys
import torch
from moe_prism.elastic import LayerParts
from moe_prism.elastic.execute.plain import reference
from moe_prism.elastic.execute.tiled import tiled
from moe_prism.kernels.target import TARGET
from moe_prism.model import find_layers
from tests.elastic.test_execute import batch
from tests.parity.families import build
assert TARGET.name == sys.argv[1], TARGET
worst = 0.0
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        layer = find_layers(build("olmoe"))[0]
        layer.arrange()
        layer.module.to(dtype)
        narrow = LayerParts(layer, 4, 0)
        for tokens in (1, 9, 60):
            x, index, weight, g = batch(narrow, tokens, 2, tokens)
            keep = torch.rand(tokens, 2, 4, generator=g) < 0.6
            out = tiled(narrow, x, index, weight, keep)
            layer.module.float()
            expected = reference(narrow, x, index, weight, keep)
            layer.module.to(dtype)
            worst = max(worst, float((out - expected).norm() / expected.norm()))
print(worst)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "sse", "avx512"])
def test_every_instruction_set_gives_the_reference(isa, tmp_path):
    """In a process of its own: numba reads its switches when it is imported."""
    root = Path(__file__).parents[2]
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        from isa import SWITCHES, runs_here
    finally:
        sys.path.pop(0)
    if not runs_here(isa):
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, **SWITCHES[isa], "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    done = subprocess.run([sys.executable, "-c", ISA, isa], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6

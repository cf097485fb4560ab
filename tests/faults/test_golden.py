"""D01: three methods on a tiny model give the bytes that are recorded for the platform, and values within a tolerance elsewhere.

`python -m tests.faults.test_golden` records golden.json again. A change of these bytes is a change that users see.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import versions
from moe_prism.checkpoint.versions import device
from moe_prism.jobs.compress import compress_model
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.options.compress import CompressOptions
from moe_prism.options.prune import PruneOptions
from tests.tiny_sources import digests, save_tiny

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-3
TEXT = "".join(f"def function_{i}(a, b={i}):\n    return [a * {i} + x for x in range(b)]\n\n\n" for i in range(400))


def processor() -> str:
    """The kind of processor. Libraries choose their loops by it: two kinds with AVX-512 gave other last bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    kind = "/".join(facts.get(key, "").strip() for key in ("vendor_id", "cpu family", "model", "stepping", "cache size"))
    return f"{kind}, flags {sha256(facts.get('flags', '').encode()).hexdigest()[:8]}"


def here() -> dict[str, Any]:
    """What decides bytes beside the code."""
    return {
        "processor": processor(),
        "versions": {k: v for k, v in versions().items() if k != "moe-prism"},
        "device": device(),
        "machine": platform.machine(),
    }


def run(root: Path) -> dict[str, Path]:
    """The folders that the methods write."""
    torch.set_num_threads(1)
    text, source = root / "text.py", root / "source"
    text.write_text(TEXT)
    save_tiny("olmoe", source, hidden_size=64, intermediate_size=32)
    calibration = CalibrateOptions(text=str(text), tokens=512, length=32, reservoir=64)
    refactor(source, root / "refactor", RefactorOptions(calibration=calibration, profile_tokens=64))
    prune_model(source, root / "prune", PruneOptions(keep=0.5, criterion="hard-count", protect=[], calibration=calibration))
    compress_model(source, root / "compress", CompressOptions(method="rtn:bits=8:group=32"))
    return {name: root / name for name in ("refactor", "prune", "compress")}


def told(folder: Path) -> dict[str, Any]:
    """sha256 of what holds values, and each tensor by shape, sum and sum of magnitudes."""
    files = {name: sha for name, sha in digests(folder).items() if name.endswith(".safetensors")}
    tensors = {}
    for name in files:
        for key, tensor in load_file(folder / name).items():
            values = tensor.double()
            tensors[f"{name}:{key}"] = [list(tensor.shape), round(float(values.sum()), 6), round(float(values.abs().sum()), 6)]
    return {"files": files, "tensors": tensors}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return run(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", ["refactor", "prune", "compress"])
def test_d01_a_golden_run_comes_out_again(folders, name):
    golden, found = json.loads(GOLDEN.read_text()), told(folders[name])
    wanted = golden["folders"][name]
    if golden["platform"] == here():
        assert found["files"] == wanted["files"]
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for key, (shape, total, size) in found["tensors"].items():
        known_shape, known_total, known_size = wanted["tensors"][key]
        assert shape == known_shape and abs(size - known_size) <= TOLERANCE * max(known_size, 1), key
        if not key.endswith(("perm", "gates")):  # a near tie may fall the other way elsewhere
            assert abs(total - known_total) <= TOLERANCE * max(known_size, 1), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        every = {name: told(folder) for name, folder in run(Path(work)).items()}
    GOLDEN.write_text(json.dumps({"platform": here(), "folders": every}, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{GOLDEN}\n")

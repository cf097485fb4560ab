"""`--expert-memory auto` within control groups that the kernel keeps: at least 5 % stay free, and nobody is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_prism import cli
from moe_prism.store.sizing import FREE
from tests.control_group import ControlGroup, control_group
from tests.tiny_sources import save_tiny

ROOT = Path(__file__).parents[2]


def generate(folder: Path, memory: str, group: ControlGroup | None = None) -> dict[str, object]:
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_prism", "generate", str(folder), "--prompt", "def f(x):", "--budget", "0.5"]
    more = ["--max-tokens", "120", "--expert-memory", memory, "--json"]
    enter = None if group is None else group.enter
    done = subprocess.run([*command, *more], env=own, capture_output=True, text=True, timeout=280, preexec_fn=enter)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_auto_leaves_memory_free_within_three_limits(text_file, tmp_path):
    """Experts of 600 MB in groups that hold a part of them, most of them, and all."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": 6}
    save_tiny("olmoe", tmp_path / "model", shard="1GB", **sizes)
    small = ("--tokens", "512", "--length", "32", "--reservoir", "64", "--profile-tokens", "64", "--solver", "contiguous")
    arguments = ["refactor", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--text", str(text_file), *small]
    assert cli.main(arguments) == 0
    wanted = generate(tmp_path / "out", "700MB")  # packs them too
    for limit in (900 << 20, 1200 << 20, 1800 << 20):
        with control_group(limit) as group:
            found = generate(tmp_path / "out", "auto", group)
        print(f"limit {limit >> 20} MiB: {group.peak >> 20} MiB held at most, {1 - group.peak / limit:.2f} free")
        assert group.peak <= (1 - FREE) * limit
        assert found["text"] == wanted["text"]

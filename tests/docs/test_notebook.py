"""The tutorial for one's own model runs from its first cell to its last, and its numbers are what its text says they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from .pages import ROOT

NOTEBOOK = ROOT / "docs" / "tutorials" / "my_own_model.py"
LESS = {
    "TOKENS": "4096",
    "LENGTH": "256",
}  # with half of that more than a fifth of the experts sees too little, and the page stops


def cells(text):
    """(kind, body) of every cell."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)[1:]
    return [(kind.strip(), body) for kind, body in zip(parts[::2], parts[1::2], strict=True)]


def test_it_is_a_notebook():
    found = cells(NOTEBOOK.read_text("utf-8"))
    assert sum(kind == "[markdown]" for kind, _ in found) >= 7 and sum(not kind for kind, _ in found) >= 10
    assert all(line.startswith("#") or not line for kind, body in found if kind for line in body.splitlines())
    for kind, body in found:
        if not kind:
            compile(body, "cell", "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs(tmp_path):
    code = NOTEBOOK.read_text("utf-8").replace("seconds=20", "seconds=3")
    for name, value in LESS.items():
        code, found = re.subn(rf"^{name} = \S+", f"{name} = {value}", code, flags=re.M)
        assert found == 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{code}\nassert 0 < saved < 1 and best.top1_agreement >= AGREEMENT"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("--- ") == 2 and (tmp_path / "elastic" / "report.html").is_file()

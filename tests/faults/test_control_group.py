"""F11 where the limit is a control group's: the kernel kills who passes it, without a word. So nobody may come to it unawares."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_prism import cli
from tests.control_group import ControlGroup, control_group
from tests.tiny_sources import digests, save_tiny

ROOT = Path(__file__).parents[2]
SMALL = ("--tokens", "768", "--length", "32", "--reservoir", "128", "--profile-tokens", "64")

MORE_AND_MORE = """
import sys
from moe_prism import cli
from tests.faults.points import fault

held = []

def more(*_, **__):
    while True:
        held.append(b"x" * (16 << 20))

with fault("layer", more, at=2):
    sys.exit(cli.main(sys.argv[1:]))
"""


def run(command: list[str], group: ControlGroup | None = None) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    enter = None if group is None else group.enter
    return subprocess.run([sys.executable, *command], env=own, capture_output=True, text=True, timeout=280, preexec_fn=enter)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f11_within_a_control_group_a_run_is_refused_or_done_and_never_killed(text_file, tmp_path):
    """at six limits around what the forecast says. Pages of libraries that others have read already count in the forecast alone."""
    save_tiny("olmoe", tmp_path / "model", num_hidden_layers=3, hidden_size=256, intermediate_size=1024)
    refactor = ["-m", "moe_prism", "refactor", str(tmp_path / "model"), "--text", str(text_file), *SMALL, "-o"]
    needed = json.loads(run([*refactor, str(tmp_path / "none"), "--dry-run", "--json"]).stdout)["peak_memory_bytes"]
    assert run([*refactor, str(tmp_path / "whole")]).returncode == 0
    codes = []
    for share in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0):
        out = tmp_path / f"out-{share}"
        with control_group(int(share * needed)) as group:
            done = run([*refactor, str(out)], group)
        codes.append(done.returncode)
        if done.returncode == 0:
            assert digests(out) == digests(tmp_path / "whole") and group.peak <= group.limit
            continue
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        assert done.returncode == 3 and len(lines) == 1 and "memory" in lines[0], done.stderr[-2000:]
        assert not list(tmp_path.glob(f"{out.name}*"))
    assert codes[-1] == 0 and 3 in codes, codes
    print(f"exit codes by limit: {codes}")


@pytest.mark.slow
def test_f11_what_a_control_group_has_killed_is_resumed(text_file, tmp_path):
    save_tiny("olmoe", tmp_path / "model", num_hidden_layers=3)
    arguments = ["refactor", str(tmp_path / "model"), "--text", str(text_file), *SMALL, "-o"]
    with control_group(2 << 30) as group:
        killed = run(["-c", MORE_AND_MORE, *arguments, str(tmp_path / "out")], group)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "unit-000.safetensors").is_file()
    assert cli.main([*arguments, str(tmp_path / "out"), "--resume"]) == 0
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")

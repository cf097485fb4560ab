"""How many processors there are, and that threads do not wait at the cost of others."""

import os
import subprocess
import sys

import pytest

from moe_prism import cores as module
from moe_prism.cores import WAITING, cores, settle_threads


@pytest.fixture
def group(monkeypatch, tmp_path):
    """A control group of its own below a parent; the function sets their limits."""

    def set_limits(own, parent=None):
        (tmp_path / "a").mkdir(exist_ok=True)
        for folder, limit in ((tmp_path / "a", own), (tmp_path, parent)):
            if limit is not None:
                (folder / "cpu.max").write_text(limit)

    monkeypatch.setattr(module, "_groups", lambda: [tmp_path / "a", tmp_path])
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return set_limits


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        (None, None, 8),
        ("max 100000", None, 8),
        ("300000 100000", None, 3),
        ("50000 100000", None, 1),
        ("400000 100000", "250000 100000", 2),
        ("9900000 100000", None, 8),
        ("broken", None, 8),
    ],
)
def test_quota_and_affinity(group, own, parent, expected):
    group(own, parent)
    assert cores() == expected


@pytest.mark.parametrize("given", [None, *WAITING])
def test_what_the_user_set_stays(group, monkeypatch, given):
    group("200000 100000")
    for name in (*WAITING, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "7")
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
    settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == ("5" if given else "2")
    assert os.environ.get("GOMP_SPINCOUNT") == ({"GOMP_SPINCOUNT": "7"}.get(given) if given else module.SPINS)


def test_a_command_settles_them_before_torch_is_there():
    code = "import sys; from moe_prism.cli import main; main(['--version']); import os; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == module.SPINS

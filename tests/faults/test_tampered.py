"""Every file of an artefact, changed in many ways, is refused in one line or changes nothing (F06, F07, X01, X05 of the fault list).

`python -m tests.faults.tamper 200` prints the figures: 200 changes of each of 14 files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = (pytest.param(6, marks=pytest.mark.slow), pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]))

COMPILED = ("tests/kernels", "tests/partition", "tests/store", "tests/elastic")


def child(shared, *arguments: str, timeout: float, **more: str) -> subprocess.CompletedProcess[str]:
    """A process in which compiled code checks its bounds; what it compiles is kept for the others."""
    cache = shared("bounds-checked", lambda folder: folder.mkdir())
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    own = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    own |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "MOE_PRISM_WHOLE": "stock", **more}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.fixture(scope="session", params=EXAMPLES)
def outcomes(request, shared) -> list[dict]:
    def build(folder: Path) -> None:
        folder.mkdir()
        done = child(shared, "tests.faults.tamper", str(request.param), timeout=3600)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "outcomes.jsonl").write_text(done.stdout)

    folder = shared(f"tampered-{request.param}", build)
    return [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]


def test_x05_every_changed_file_is_refused_in_one_line_or_changes_nothing(outcomes):
    defects = [defect for row in outcomes for defect in row["defects"]]
    assert not defects, "\n".join(defects[:5])
    assert len(outcomes) == 14 and all(row.get("refused") for row in outcomes)


@pytest.fixture(scope="session")
def checked(shared):
    """checked(suite): the compiled functions that there are, and those that ran, in the tests of a folder with every access checked."""

    def run(suite: str) -> dict[str, list[str]]:
        def build(folder: Path) -> None:
            folder.mkdir()
            own = ["-q", "-x", "-p", "tests.faults.bounds", "-p", "no:cacheprovider", suite]
            done = child(shared, "pytest", *own, timeout=3500, BOUNDS_RAN=str(folder / "ran.json"))
            assert done.returncode == 0, done.stdout[-3000:]

        return json.loads((shared("bounds-" + suite.replace("/", "-"), build) / "ran.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suite", COMPILED)
def test_x05_compiled_code_stays_in_its_arrays(checked, suite):
    """Compiling everything again for its bounds is what takes the time: a process per folder, and one cache for all."""
    assert checked(suite)["ran"]


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_x05_every_compiled_function_was_checked(checked):
    found = [checked(suite) for suite in COMPILED]
    assert not set(found[0]["every"]) - {name for each in found for name in each["ran"]}

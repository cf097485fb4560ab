"""X06: what goes out. `make release` makes the environment of these tools, and keeps the wheel and the bill of materials in dist/."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.release, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
TOOLS = Path(os.environ.get("RELEASE_TOOLS", ROOT / ".venv-release" / "bin"))
PINS = ROOT / "requirements" / "constraints.txt"


def tool(name: str) -> str:
    if not (TOOLS / name).is_file():
        pytest.skip(f"no {name} in {TOOLS}: `make release` installs it")
    return str(TOOLS / name)


def built(tree: Path, out: Path, umask: int) -> Path:
    """The wheel of a copy of the tree."""
    skipped = shutil.ignore_patterns(".git", ".venv*", "dist", "build", "demo", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=skipped)
    for path in tree.rglob("*"):
        os.utime(path, (1e9 + umask, 1e9 + umask))
    command = [tool("python"), "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": str(umask)}
    done = subprocess.run(command, env=environment, umask=umask, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    return wheel


def test_x06_a_wheel_is_the_same_bytes_again(tmp_path):
    """In another folder, with other times and another umask."""
    first, again = built(tmp_path / "a", tmp_path / "one", 0o022), built(tmp_path / "b" / "c", tmp_path / "two", 0o027)
    assert first.name == again.name
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()
    (ROOT / "dist").mkdir(exist_ok=True)
    shutil.copy(first, ROOT / "dist" / first.name)


def test_x06_the_bill_of_materials_has_every_pin(tmp_path):
    out = ROOT / "dist" / "sbom.json"
    out.parent.mkdir(exist_ok=True)
    command = [tool("cyclonedx-py"), "requirements", str(PINS), "--output-reproducible", "--of", "JSON", "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    bill = json.loads(out.read_text())
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line and not line.startswith("#"))
    assert bill["bomFormat"] == "CycloneDX"
    assert {c["name"]: c.get("version") for c in bill["components"]} == {name: version.strip() for name, version in pins.items()}


def test_x06_no_pin_has_a_known_vulnerability(tmp_path):
    """Skipped where no database answers: a machine without one must not call itself audited."""
    out = tmp_path / "audit.json"
    command = [
        tool("pip-audit"),
        "--progress-spinner",
        "off",
        "--no-deps",
        "--disable-pip",
        "-r",
        str(PINS),
        "-f",
        "json",
        "-o",
        str(out),
    ]
    for service in ("pypi", "osv"):
        subprocess.run([*command, "-s", service, "--timeout", "20"], check=False, capture_output=True)
        rows = json.loads(out.read_text())["dependencies"] if out.is_file() else []
        asked = [row for row in rows if "skip_reason" not in row]
        if len(asked) > len(rows) // 2:
            break
        out.unlink(missing_ok=True)
    else:
        pytest.skip("no vulnerability database could be reached: nothing was audited")
    known = [f"{row['name']} {row['version']}: {', '.join(v['id'] for v in row['vulns'])}" for row in asked if row["vulns"]]
    assert not known, "\n".join(known)


def test_x06_actions_are_pinned():
    """Where continuous integration runs other people's actions, each is named by its commit."""
    for file in ROOT.glob(".github/workflows/*.y*ml"):
        for line in file.read_text().splitlines():
            if "uses:" in line and "./" not in line:
                assert len(line.split("@")[1].split()[0]) == 40, f"{file.name}: {line.strip()}"
    assert sys.version_info >= (3, 11)

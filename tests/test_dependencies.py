"""Every library that the package imports is declared: by the core, or by the extra that its importer belongs to."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/moe_prism"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "vl_convert": "vl-convert-python",
    "prometheus_client": "prometheus-client",
    "opentelemetry": "opentelemetry-sdk",
    "sklearn": "scikit-learn",
}
NEEDS = {"serve": "serve", "report": "report", "kernels/triton_kernels.py": "gpu", "checkpoint/gguf_file.py": "gguf"}
"""Folder or file -> the extra without which it may fail to import."""
VLLM = {"vllm"}  # the plug-in lives in vLLM's own environment, which nobody installs as an extra of ours


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", r)[0].lower() for r in requirements}


CORE = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(r) for name, r in PROJECT["optional-dependencies"].items()}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(distribution, whether the import runs as soon as the module does)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "moe_prism":
                yield DISTRIBUTIONS.get(top, top.replace("_", "-")), node in tree.body


def undeclared(path: Path) -> Iterator[str]:
    place = str(path.relative_to(SOURCE))
    own = {extra for start, extra in NEEDS.items() if place == start or place.startswith(f"{start}/")}
    at_once = CORE.union(*(EXTRAS[e] for e in own))
    somewhere = CORE.union(*EXTRAS.values())
    for name, runs_at_once in imports(path):
        if name not in VLLM and name not in (at_once if runs_at_once else somewhere):
            yield f"{place} imports {name}, which nothing declares"


@pytest.mark.parametrize("package", sorted(SOURCE.iterdir()), ids=lambda p: p.name)
def test_every_import_is_declared(package: Path) -> None:
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package] * (package.suffix == ".py")
    assert not [line for file in files for line in undeclared(file)]


def test_nothing_is_declared_twice() -> None:
    for requirements in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert len(declared(requirements)) == len(requirements)


def test_core_and_extras_are_pinned_where_tests_run() -> None:
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "requirements/constraints.txt").read_text().splitlines()
    }
    assert {"torch", "transformers"} <= pinned
    assert pinned >= CORE


def test_the_lock_file_holds_every_library_with_its_hashes_and_names_no_host() -> None:
    text = (ROOT / "requirements/lock.txt").read_text()
    locked = {name.lower() for name in re.findall(r"^([A-Za-z0-9_.-]+)==", text, re.M)}
    assert locked >= CORE | EXTRAS["report"] | EXTRAS["serve"] - {"starlette"} and "://" not in text
    assert text.count("--hash=sha256:") > len(locked)

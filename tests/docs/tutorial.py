"""Do what a tutorial in docs/developer/ says: put its file where it belongs, and its line into the registry."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_prism import cli
from moe_prism.registry import Entry, Registry, View

from .pages import ROOT, blocks
from .warm import smaller

SOURCE = "src/moe_prism/"


@dataclass(frozen=True)
class Part:
    """A Python block of a page: where it goes, as its first line says, and what stands below that."""

    place: str
    code: str


def parts(page: str) -> list[Part]:
    """The Python blocks of a page of docs/developer."""
    found = []
    for block in blocks((ROOT / "docs" / "developer" / page).read_text("utf-8")):
        if block.language == "python":
            first, _, code = block.body.partition("\n")
            assert first.startswith("# "), f"{page}: a block does not say where it goes"
            found.append(Part(first[2:].partition(",")[0], code))
    return found


def commands(page: str) -> list[list[str]]:
    """The words after `moe-prism` of every command in a page's console blocks."""
    shown = [b for b in blocks((ROOT / "docs" / "developer" / page).read_text("utf-8")) if b.language == "console"]
    lines = [shlex.split(line) for block in shown for line in block.lines]
    return [words[1:] for words in lines if words[:1] == ["moe-prism"]]


@contextmanager
def placed(part: Part, folder: Path) -> Iterator[ModuleType]:
    """The part's file as the module that it would be at its place, for as long as the block lasts. It is written to `folder`."""
    assert part.place.startswith(SOURCE) and not (ROOT / part.place).exists()
    (folder / part.place).parent.mkdir(parents=True, exist_ok=True)
    (folder / part.place).write_text(part.code)
    name = part.place.removeprefix("src/").removesuffix(".py").replace("/", ".")
    package = importlib.import_module(name.rpartition(".")[0])
    package.__path__.append(str((folder / part.place).parent))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(name)
    finally:
        package.__path__.pop()
        sys.modules.pop(name, None)
        vars(package).pop(name.rpartition(".")[2], None)


def entries(part: Part) -> dict[str, Entry]:
    """What the line of a registry says."""
    found = eval("{" + part.code + "}", {"Entry": Entry})
    return {name: entry if isinstance(entry, Entry) else Entry(*entry) for name, entry in found.items()}


@contextmanager
def registered(part: Part, registry: Registry[Any], *views: View[Any]) -> Iterator[str]:
    """The registry with the part's line in it; yields the name."""
    ((name, entry),) = entries(part).items()
    assert name not in registry.names()
    registry._builtin[name] = entry
    try:
        yield name
    finally:
        del registry._builtin[name]
        for known in (registry._resolved, *(view._known for view in views)):
            known.pop(name, None)


@contextmanager
def followed(page: str, folder: Path, registry: Registry[Any], *views: View[Any]) -> Iterator[str]:
    """A tutorial of one file and one line, done; yields the registered name."""
    file, line = parts(page)
    with ExitStack() as stack:
        stack.enter_context(placed(file, folder))
        yield stack.enter_context(registered(line, registry, *views))


def follows_the_house_rules(part: Part) -> None:
    """Formatted, free of lint, and short: what the reader copies passes `make check`."""
    place = ["--stdin-filename", str(ROOT / part.place), "-"]
    for command in (["format", "--check", *place], ["check", *place]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], input=part.code, capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(part.code.splitlines()) < 100


def run(words: Sequence[str], text: Path) -> None:
    """One command in this process, on as little text as its tests need; it must succeed."""
    given = [*words]
    if words[0] in ("frontier", "skip", "prune", "trace"):
        small = ["--length", "128", "--tokens", "512"] if words[0] == "trace" else ["--length", "32"]
        given += ["--text", str(text), *small]
    assert cli.main(smaller(given)) == 0, given


def answer(words: Sequence[str], text: Path, capsys: Any) -> dict[str, Any]:
    """The JSON object that a command prints."""
    capsys.readouterr()
    run([*words, "--json"], text)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found

"""Which files of a folder are read: of a git checkout what git tracks, of a data set its tables, else every file of text."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..tally import TextTally
from .stream import inner_name

JSON_LINES = {".jsonl", ".ndjson", ".jsonlines"}
JSON = {".json", ".ipynb"}
CSV = {".csv", ".tsv"}
PARQUET = {".parquet", ".pq"}
ARROW = {".arrow"}
ROWS = JSON_LINES | JSON | CSV | PARQUET | ARROW
FILES = 1_000_000
GIT_SECONDS = 60
_TRAIN = re.compile(r"(^|[-_./])train([-_./]|$)")
_OTHER = re.compile(r"(^|[-_./])(test|validation|valid|val|dev|eval)([-_./]|$)")


def is_saved_dataset(folder: Path) -> bool:
    """Written by `save_to_disk` of the datasets library."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def files_of(folder: Path, tally: TextTally) -> list[tuple[str, Path]]:
    """(name within the folder, path) of all files that may be read, in order of their names; the others are counted."""
    tracked = _tracked(folder) if (folder / ".git").exists() else None
    found = sorted(_walk(folder, tally) if tracked is None else tracked)
    kept = []
    for name in found[:FILES]:
        path, parts = folder / name, PurePosixPath(name).parts
        if any(part.startswith(".") for part in parts):
            tally.leave_out("hidden files", name)
        elif not path.is_file():
            tally.leave_out("links and special files", name)
        else:
            kept.append((name, path))
    if len(found) > FILES:
        tally.leave_out(f"files beyond the first {FILES:,}", found[FILES], len(found) - FILES)
    return _of_dataset(kept, tally) if _is_dataset(folder, found) else kept


def _walk(folder: Path, tally: TextTally) -> Iterator[str]:
    """Links to files are followed (the hub's cache has them), links to folders are not."""
    for root, folders, names in os.walk(folder):
        for name in list(folders):
            where = Path(root, name).relative_to(folder).as_posix()
            if name.startswith(".") or Path(root, name).is_symlink():
                folders.remove(name)
                tally.leave_out("hidden folders" if name.startswith(".") else "links and special files", where)
        yield from (Path(root, name).relative_to(folder).as_posix() for name in names)


def _tracked(folder: Path) -> list[str] | None:
    """Names that git tracks; None where git is missing or refuses. The folder's own configuration must not name a program to run."""
    safe = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    command = ["git", *safe, "-C", str(folder), "ls-files", "-z", "--cached"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    environment.pop("GIT_DIR", None)
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, env=environment, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    names = {os.fsdecode(name) for name in done.stdout.split(b"\0") if name}
    return [name for name in names if not (folder / name).is_symlink()]


def _is_dataset(folder: Path, names: list[str]) -> bool:
    """As the hub gives it: tables, beside a card or what git needs to store them."""
    if not any(_suffix(name) in ROWS for name in names):
        return False
    card = folder / "README.md"
    if ".gitattributes" in names and not (folder / ".git").exists():
        return True
    try:
        with card.open("rb") as file:
            return bool(re.match(rb"---\s", file.read(8)))
    except OSError:
        return False


def _of_dataset(files: list[tuple[str, Path]], tally: TextTally) -> list[tuple[str, Path]]:
    """Its tables, of the split train where there is one; a table that describes others (`dataset_infos.json`) is none."""
    tables = [
        (n, p)
        for n, p in files
        if _suffix(n) in ROWS and PurePosixPath(n).name not in ("dataset_infos.json", "dataset_info.json")
    ]
    has_train = any(_TRAIN.search(name.lower()) for name, _ in tables)
    kept = []
    for name, path in files:
        if (name, path) not in tables:
            tally.leave_out("files beside the data set's tables", name)
        elif has_train and not _TRAIN.search(name.lower()) and _OTHER.search(name.lower()):
            tally.leave_out("files of other splits than train", name)
        else:
            kept.append((name, path))
    return kept


def _suffix(name: str) -> str:
    return inner_name(PurePosixPath(name)).suffix.lower()

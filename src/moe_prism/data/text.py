"""Read text from where users have it: a file, a folder, JSON lines, a saved Hugging Face dataset, or what Python itself carries."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptError, UsageError

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text", ""}
SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "site-packages", "dist-packages"}
MAX_FILE_BYTES = 300_000  # of a standard library file: longer ones are tables


@dataclass(frozen=True)
class Document:
    """A named piece of text; the name decides the split."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_documents(source: str | Path) -> list[Document]:
    """All documents of a source, in a stable order. A path, or one of two texts every interpreter carries: `stdlib` is Python's own
    source code, `topics` the English prose of its help topics (prism-nano has seen neither its words nor its kind).

    Raises UsageError for a missing path or nothing readable, CorruptError for a broken JSON line.
    """
    if str(source) in BUNDLED:
        return list(BUNDLED[str(source)]())
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(
            f"text source '{source}' does not exist", "give a text file, a folder, a .jsonl file, 'stdlib' or 'topics'"
        )
    if path.is_file():
        return list(_file(path, path.name))
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return list(_dataset(path))
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES | {".jsonl"})
    documents = [d for p in files for d in _file(p, p.relative_to(path).as_posix())]
    if not documents:
        raise UsageError(f"no text found in '{source}'", "put .txt, .md, .py or .jsonl files there")
    return documents


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIP.isdisjoint(relative.parts[:-1]) and 200 <= path.stat().st_size <= MAX_FILE_BYTES:
            yield Document(relative.as_posix(), path.read_text("utf-8", errors="replace"))


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("this Python was installed without its help topics", "name a text file instead") from error
    for name, text in sorted(topics.items()):
        yield Document(name, text)


BUNDLED: Mapping[str, Callable[[], Iterator[Document]]] = {"stdlib": _stdlib, "topics": _topics}


def _file(path: Path, name: str) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _json_lines(path, name)
        return
    yield Document(name, _utf8(path))


def _utf8(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text (byte {error.start})", "convert it, or name another file") from error


def _json_lines(path: Path, name: str) -> Iterator[Document]:
    # not splitlines: U+2028 and its like may stand unescaped inside a JSON string
    for number, line in enumerate(_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorruptError(f"{path}:{number} is not JSON: {error}", "fix or remove the line") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UsageError(f"{path}:{number} has no string field 'text'", 'write lines like {"text": "..."}')
        # an escaped half of a surrogate pair is legal JSON and no text: nothing downstream could encode it
        yield Document(f"{name}:{number}", text.encode("utf-8", "replace").decode("utf-8"))


def _dataset(path: Path) -> Iterator[Document]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise UsageError(f"'{path}' is a saved dataset and the datasets library is missing", "pip install datasets") from error
    loaded = load_from_disk(str(path))
    for part, rows in loaded.items() if isinstance(loaded, DatasetDict) else [("rows", loaded)]:
        if "text" not in rows.column_names:
            raise UsageError(f"dataset '{path}' has no column 'text'", f"its columns are {', '.join(rows.column_names)}")
        for number, text in enumerate(rows["text"]):
            yield Document(f"{part}:{number}", text)

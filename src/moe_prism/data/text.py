"""Read text from where users have it: a file, a folder, JSON lines, a saved Hugging Face dataset, or what Python itself carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import CorruptError, UsageError
from .bundled import BUNDLED
from .document import Document

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text", ""}


def read_documents(source: str | Path) -> list[Document]:
    """All documents of a source, in a stable order. A path, or the name of a text that needs no file (`data.bundled`).

    Raises UsageError for a missing path or nothing readable, CorruptError for a broken JSON line.
    """
    if str(source) in BUNDLED:
        return BUNDLED[str(source)]()
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(
            f"text source '{source}' does not exist", f"give a text file, a folder, a .jsonl file, or one of {', '.join(BUNDLED)}"
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
        except (ValueError, RecursionError) as error:
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

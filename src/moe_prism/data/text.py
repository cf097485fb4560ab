"""Read text from where users have it: files of any encoding, rows of JSON, CSV and tables, folders, git checkouts, saved data sets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ..errors import CorruptError, UsageError
from ..options.text import FORMS, absent
from ..tally import TextTally
from .bundled import BUNDLED
from .chat import Chat
from .document import Document
from .fields import STRANGE, LeftOutError, Turns, content_of, unknown_fields
from .folder import ARROW, CSV, JSON, JSON_LINES, PARQUET, files_of, is_saved_dataset
from .json_rows import LONG, json_lines, json_values
from .stream import (
    PLAIN,
    ROW_CHARACTERS,
    SOURCE_BYTES,
    Allowance,
    Characters,
    encoding_of,
    inner_name,
    read_head,
)
from .tables import arrow_rows, csv_rows, parquet_rows, saved_rows

LONG_TEXT = 1 << 24  # characters of a file that is one document; a longer one is cut into pieces
PIECE = 1 << 20
HOPELESS = 1000  # rows without a field of text before a file is given up
_LFS = b"version https://git-lfs"


@dataclass
class Reading:
    """How a source is read. names: fields of text, if named; tally: what comes of it; chat: how conversations are written."""

    tally: TextTally
    names: Sequence[str] = ()
    chat: Chat = field(default_factory=Chat)
    allowance: Allowance = field(default_factory=Allowance)


Found = tuple[str, str | Turns, bool]
"""(name, what it says, whether it is a part of a file)."""


def read_documents(source: str | Path, reading: Reading | None = None) -> list[Document]:
    """All documents of a source, in a stable order. A path, or the name of a text that needs no file (`data.bundled`).

    Raises UsageError for a missing path, nothing readable or rows without a known field; CorruptError for a damaged file.
    """
    return list(stream_documents(source, reading or Reading(TextTally(str(source)))))


def stream_documents(source: str | Path, reading: Reading) -> Iterator[Document]:
    """The same, one after the other."""
    if str(source) in BUNDLED:
        documents = BUNDLED[str(source)]()
        reading.tally.documents += len(documents)
        yield from documents
        return
    for name, said, is_part in stream_contents(source, reading):
        try:
            text = said if isinstance(said, str) else reading.chat.write(said)
        except LeftOutError as reason:
            reading.tally.leave_out(str(reason), name)
            continue
        reading.tally.documents += 1
        yield Document(name, text, is_part)
    tally = reading.tally
    if not tally.documents and tally.left_out:
        said = f" ({reading.chat.refusal})" if reading.chat.refusal else ""
        raise UsageError(f"no text found in '{source}': {tally.line().partition('; ')[2]}{said}", f"give {FORMS} with text in it")


def stream_contents(source: str | Path, reading: Reading) -> Iterator[Found]:
    """What a path holds, before conversations are written out."""
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file(path, path.name, reading)
    elif path.is_dir():
        yield from _dataset(path, reading) if is_saved_dataset(path) else _folder(path, reading)
    else:
        what = "is no file or folder" if path.exists() else "does not exist"
        raise absent(source, what)


def _folder(folder: Path, reading: Reading) -> Iterator[Found]:
    """A file that cannot be read costs itself, not the others; if that leaves nothing, the first of these errors is raised."""
    tally, first, count = reading.tally, None, 0
    for name, path in files_of(folder, tally):
        if reading.allowance.is_spent:
            tally.leave_out(f"files beyond {SOURCE_BYTES >> 30} GiB", name)
            continue
        try:
            reason = _reason_against(path, name)
            if reason:
                tally.leave_out(reason, name)
                continue
            for found in _file(path, name, reading):
                count += 1
                yield found
        except (UsageError, CorruptError, OSError) as error:
            if _is_missing_library(error):
                raise
            first = first or error
            tally.leave_out(_kind(error, name), name)
    if not count:
        if first is not None:
            raise first
        counted = f": {tally.line().partition('; ')[2]}" if tally.left_out else ""
        raise UsageError(f"no text found in '{folder}'{counted}", f"give {FORMS}")


def _kind(error: Exception, name: str) -> str:
    if isinstance(error, UsageError):
        return "files of rows without a field of text"
    return "damaged files" if isinstance(error, CorruptError) and _suffix(name) != ".json" else "files that cannot be read"


def _is_missing_library(error: Exception) -> bool:
    return isinstance(error, UsageError) and isinstance(error.__cause__, ImportError)


def _reason_against(path: Path, name: str) -> str | None:
    """Why a file of a folder is not read, if that can be seen from its beginning."""
    suffix = _suffix(name)
    if suffix in PARQUET | ARROW:
        with path.open("rb") as file:
            return "Git LFS pointers (the file itself was not fetched)" if file.read(len(_LFS)) == _LFS else None
    head = read_head(path)
    if head.startswith(_LFS):
        return "Git LFS pointers (the file itself was not fetched)"
    if encoding_of(head, inner_name(PurePath(name))) is None:
        return "binary files"
    return "empty files" if not head.strip() and len(head) < 4096 else None


def _suffix(name: str) -> str:
    return inner_name(PurePath(name)).suffix.lower()


def _file(path: Path, name: str, reading: Reading) -> Iterator[Found]:
    suffix = _suffix(name)
    with path.open("rb") as file:
        mark = file.read(24)
    if mark.startswith(_LFS):
        raise UsageError(f"'{path}' is a Git LFS pointer, not the file itself", "fetch it with git lfs pull")
    if suffix in PARQUET or mark.startswith(b"PAR1"):
        yield from _rows(path, name, parquet_rows(path, reading.names), reading)
        return
    if suffix in ARROW:
        yield from _rows(path, name, arrow_rows(path, reading.names), reading)
        return
    characters = Characters(path, name, reading.tally, reading.allowance)
    if suffix in CSV:
        yield from _rows(path, name, csv_rows(characters, reading.names), reading)
    elif suffix in JSON_LINES | JSON or _looks_like_rows(path, suffix):
        is_lines = suffix not in JSON and _first_sign(path) != "["
        yield from _rows(path, name, json_lines(characters) if is_lines else json_values(characters), reading)
    else:
        yield from _plain(characters)


def _looks_like_rows(path: Path, suffix: str) -> bool:
    """A file without a telling suffix, whose first line is a JSON object."""
    if suffix not in PLAIN - {".py", ".md", ".rst"} | {""}:
        return False
    line = _beginning(path).lstrip().partition("\n")[0]
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _first_sign(path: Path) -> str:
    return _beginning(path).lstrip()[:1]


def _beginning(path: Path) -> str:
    head = read_head(path)
    encoding = encoding_of(head, inner_name(path))
    return head.decode(encoding, "replace") if encoding else ""


def _rows(path: Path, name: str, rows: Iterable[tuple[object, Any]], reading: Reading) -> Iterator[Found]:
    """Documents of rows. UsageError with the names of their fields where none has text: of all rows, or of the first HOPELESS."""
    against: Counter[str] = Counter()
    first: dict[str, str] = {}
    good, strange, example = 0, 0, None
    for number, row in rows:
        try:
            said = content_of(row, reading.names)
            if len(said if isinstance(said, str) else said.plain) > ROW_CHARACTERS:
                raise LeftOutError(LONG)
        except LeftOutError as reason:
            against[str(reason)] += 1
            first.setdefault(str(reason), f"{name}:{number}")
            if str(reason) in STRANGE:
                strange, example = strange + 1, example or row
            if strange == HOPELESS and not good:
                break
            continue
        good += 1
        yield f"{name}:{number}", said, True
    if strange and not good:
        if not isinstance(example, dict):
            raise UsageError(f"'{path}' holds rows that are no objects with fields", 'write rows like {"text": "..."}')
        raise unknown_fields(f"'{path}'", example, reading.names)
    for unread, count in against.items():
        reading.tally.leave_out(unread, first[unread], count)


def _plain(characters: Characters) -> Iterator[Found]:
    """A file as one document, or in pieces where it is very long."""
    held: list[str] = []
    size, number = 0, 0
    for chunk in characters:
        held.append(chunk)
        size += len(chunk)
        while size > (LONG_TEXT if number == 0 else PIECE):
            whole = "".join(held)
            cut = whole.rfind("\n", 0, PIECE) + 1 or PIECE
            number += 1
            yield f"{characters.name}:{number}", whole[:cut], True
            held, size = [whole[cut:]], len(whole) - cut
    yield (f"{characters.name}:{number + 1}" if number else characters.name), "".join(held), number > 0


def _dataset(folder: Path, reading: Reading) -> Iterator[Found]:
    """What `save_to_disk` wrote."""
    rows = saved_rows(folder, reading.names, reading.tally)
    yield from _rows(folder, folder.name, ((f"{split}:{number}", row) for split, number, row in rows), reading)

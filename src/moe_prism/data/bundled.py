"""Texts that need no file of the user's, by name: what every Python interpreter carries, and what moe-prism ships.

`stdlib` and `domains` have two sides that no shipped model was trained on. Defaults are chosen on `stdlib` and `topics`; the
evaluation side of `domains` is for reports, and nothing is chosen by it. `topics` is unseen by prism-nano only: prism-nano-mix was
trained on Python's documentation, of which the help topics are a part.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from ..errors import CorruptError, UsageError
from .buckets import CALIBRATION, HELD_OUT, bucket_of
from .document import Document
from .near_copies import without_near_copies

SKIP = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "site-packages", "dist-packages"}
MAX_FILE_BYTES = 300_000  # of a standard library file: longer ones are tables
DOMAINS = ("python", "prose", "headers", "web")
SHIPPED = Path(__file__).parent / "domains" / "domains.jsonl.gz"
# a line that begins with a string, a number or a bracket, and not with a name: an entry of a table
_ENTRY = re.compile(r"""\s*[-+]?(?:[bru]?(?:"(?!"")|'(?!''))|\d|[\[({])""", re.IGNORECASE)


def is_program(text: str) -> bool:
    """Whether source text is a program and no table: codecs, entities and other generated data repeat one line hundreds of times.

    A program has lines of a readable length, consists of letters for the most part, and less than half of its lines are entries.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or len(text) > 90 * len(lines):
        return False
    head = text[:20_000]
    letters = sum(c.isalpha() or c.isspace() for c in head)
    return letters > 0.6 * len(head) and 2 * sum(bool(_ENTRY.match(line)) for line in lines) < len(lines)


def stdlib() -> list[Document]:
    """The programs of the standard library that no shipped model was trained on: the two sides of the split, evaluation first.

    Tables are left out, and so is a file of which much stands in one before it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sides: dict[int, list[Document]] = {HELD_OUT: [], CALIBRATION: []}
    for path in sorted(python_files(root)):
        bucket = bucket_of(path.name)
        if bucket in sides and 200 <= path.stat().st_size <= MAX_FILE_BYTES:
            text = path.read_text("utf-8", errors="replace")
            if is_program(text):
                sides[bucket].append(Document(path.relative_to(root).as_posix(), text))
    return without_near_copies([*sides[HELD_OUT], *sides[CALIBRATION]])


def python_files(root: Path) -> Iterator[Path]:
    """Sources below a folder, without tests and other people's packages."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIP]  # most files of an installation are in these
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def topics() -> list[Document]:
    """The English prose of Python's help topics."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError as error:
        raise UsageError("this Python was installed without its help topics", "name a text file instead") from error
    return [Document(name, text) for name, text in sorted(found.items())]


def domain(name: str) -> list[Document]:
    """The shipped files of one domain (see domains/NOTICE)."""
    try:
        rows = [json.loads(line) for line in gzip.decompress(SHIPPED.read_bytes()).decode().splitlines()]
    except OSError as error:
        raise CorruptError(f"the shipped text cannot be read: {error}", "install moe-prism again") from error
    return [Document(row["name"], row["text"]) for row in rows if row["domain"] == name]


def all_domains() -> list[Document]:
    """The four domains, one after the other."""
    return [d for name in DOMAINS for d in domain(name)]


BUNDLED: Mapping[str, Callable[[], list[Document]]] = {
    "stdlib": stdlib,
    "topics": topics,
    "domains": all_domains,
    **{f"domains/{name}": partial(domain, name) for name in DOMAINS},
}
KINDS: Mapping[str, str] = {
    "stdlib": "Python source of the standard library",
    "domains": "Python, English documentation, C++ headers, JavaScript, JSON and HTML",
    "topics": "English help texts of Python",
    "domains/python": "Python source",
    "domains/prose": "English documentation",
    "domains/headers": "C++ headers",
    "domains/web": "JavaScript, JSON and HTML",
}
"""What each of them holds, in words."""
UNSEEN = set(BUNDLED) - {"topics"}  # only files of the two buckets that no shipped model was trained on

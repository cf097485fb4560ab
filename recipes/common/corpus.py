"""Files of several sources to the texts of a model: read up to a cap, split by name, freed of near-copies, evaluation first."""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_prism.data import Document
from moe_prism.data.buckets import CALIBRATION, HELD_OUT, bucket_of
from moe_prism.data.near_copies import without_near_copies

SPLITS = ("heldout", "calibration", "train")  # in the order in which near-copies are kept
SKIP_DIRS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "site-packages", "_vendor", "vendor", "locale"}
MIN_BYTES = 200
SHINGLES_ONE_IN = 4


@dataclass(frozen=True)
class Source:
    """A folder of one project, and how much of it is used at most."""

    domain: str
    project: str
    licence: str
    root: Path
    suffixes: tuple[str, ...]
    usable: Callable[[str], bool]
    megabytes: float
    max_bytes: int = 200_000
    skip: frozenset[str] = frozenset()  # folders, beside SKIP_DIRS
    only: str = ""  # a folder that must be on the way


@dataclass(frozen=True)
class Text:
    """A document that was chosen, with what the manifest says of it."""

    source: Source
    document: Document
    split: str

    @property
    def line(self) -> str:
        s = self.source
        size = len(self.document.text.encode())
        return f"{self.document.sha256[:16]}\t{self.split}\t{size}\t{s.domain}\t{s.licence}\t{self.document.name}"


def split_of(name: str) -> str:
    return {HELD_OUT: "heldout", CALIBRATION: "calibration"}.get(bucket_of(name), "train")


def _decode(path: Path) -> str | None:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return None


def _paths(source: Source) -> list[Path]:
    def wanted(path: Path) -> bool:
        parts = path.relative_to(source.root).parts
        name = parts[-1].removesuffix(".gz")
        fits = any(name.endswith(s) if s.startswith(".") else name.startswith(s) for s in source.suffixes)
        return fits and not (SKIP_DIRS | source.skip) & set(parts[:-1]) and (not source.only or source.only in parts)

    return sorted(p for p in source.root.rglob("*") if wanted(p) and p.is_file() and not p.is_symlink())


def read_source(source: Source, name_of: Callable[[Source, Path], str], seed: int) -> Iterator[Text]:
    """Usable files in an order fixed by the seed, each split up to its cap (held-out and calibration: a tenth of the training's)."""
    room = {s: source.megabytes * 1e6 * (1.0 if s == "train" else 0.1) for s in SPLITS}
    paths = _paths(source)
    random.Random(f"{seed} {source.project}").shuffle(paths)
    for path in paths:
        name = name_of(source, path.relative_to(source.root))
        split = split_of(name)
        if room[split] <= 0 or not MIN_BYTES <= path.stat().st_size <= source.max_bytes:
            continue
        text = _decode(path)
        if text is None or len(text) > source.max_bytes or not source.usable(text):
            continue
        room[split] -= len(text.encode())
        yield Text(source, Document(name, text), split)


def read_splits(sources: Sequence[Source], name_of: Callable[[Source, Path], str], seed: int) -> dict[str, list[Text]]:
    """The texts of every split. No near-copy of a held-out text is in the others, and none of a calibration text in the training's."""
    texts = [t for source in sources for t in read_source(source, name_of, seed)]
    protected: list[Document] = []
    splits: dict[str, list[Text]] = {}
    for split in SPLITS:
        of = {id(t.document): t for t in texts if t.split == split}
        kept = without_near_copies([t.document for t in of.values()], protected=protected, one_in=SHINGLES_ONE_IN)
        splits[split] = [of[id(d)] for d in kept]
        protected += kept
    return splits


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

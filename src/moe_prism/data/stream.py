"""Files as streams of characters: decompressed, decoded, bounded. Nothing here holds a whole file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import mimetypes
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from ..errors import CorruptError, UsageError
from ..tally import TextTally

HEAD_BYTES = 1 << 16  # what a decision about a file is based on
CHUNK_BYTES = 1 << 18
SOURCE_BYTES = 8 << 30  # of a source, decompressed: a small archive can unpack to any size
ROW_CHARACTERS = 1 << 25  # of one row or line
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
EXTRA = "pip install 'moe-prism[text]'"
PLAIN = {".txt", ".text", ".md", ".rst", ".py"}  # may hold any character
LATIN_SHARE = 0.25  # of bytes beyond ASCII in Latin-1; a text of more is in another alphabet, or none
_CONTROL = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]")
_ESCAPED = re.compile("[\udc80-\udcff]")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class Allowance:
    """Bytes of a source that may still be read."""

    left: int = SOURCE_BYTES

    @property
    def is_spent(self) -> bool:
        return self.left <= 0


def inner_name(path: PurePath) -> PurePath:
    """The name without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED and path.stem else path


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its suffix. CorruptError for damage, UsageError where a library is missing."""
    try:
        with _open(path) as file:
            yield file
    except (zlib.error, EOFError, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; damage has no number
            raise
        raise CorruptError(f"'{path}' cannot be decompressed: {error}", "restore the file from its source") from error


def _open(path: Path) -> IO[Any]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        return _zstandard(path)
    return path.open("rb")


def _zstandard(path: Path) -> IO[Any]:
    try:
        import pyarrow
    except ImportError as error:
        raise UsageError(f"'{path}' is compressed with zstandard, and pyarrow is missing to read it", EXTRA) from error
    return pyarrow.input_stream(str(path), compression="zstd")  # type: ignore[no-any-return]


def read_head(path: Path) -> bytes:
    """The first bytes of what is in a file."""
    with opened(path) as file:
        return _read_full(file, HEAD_BYTES)


def _read_full(file: IO[bytes], size: int) -> bytes:
    parts, missing = [], size
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def encoding_of(head: bytes, name: PurePath) -> str | None:
    """Of a file that begins so: "utf-8" also stands for Latin-1; None is no text, or none whose encoding is known."""
    if head.startswith(b"%PDF") or _is_media(name):
        return None
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if wide := _utf16_without_mark(head):
        return wide
    if b"\0" in head and name.suffix.lower() not in PLAIN:
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        beyond = len(head) - len(head.translate(None, bytes(range(128, 256))))
        return None if _CONTROL.search(head) or beyond > max(16, LATIN_SHARE * len(head)) else "utf-8"
    return "utf-8"


def _is_media(name: PurePath) -> bool:
    kind = mimetypes.guess_type(name.name)[0] or ""
    is_code = kind.endswith("xml") or name.suffix == ".ts"  # SVG; TypeScript, which shares its suffix with video
    return kind.startswith(("image/", "audio/", "video/", "font/")) and not is_code


def _utf16_without_mark(head: bytes) -> str | None:
    """Western text has a zero in nearly every other byte, and none in the others."""
    even, odd = head[: len(head) // 2 * 2 : 2], head[1::2]
    if len(odd) < 8:
        return None
    low, high = even.count(0) / len(even), odd.count(0) / len(odd)
    return "utf-16-le" if high > 0.7 and low < 0.05 else "utf-16-be" if low > 0.7 and high < 0.05 else None


class Characters:
    """The characters of a file, in chunks. `is_cut`: the allowance ended before the file did."""

    def __init__(self, path: Path, name: str, tally: TextTally, allowance: Allowance) -> None:
        self.path, self.name, self.tally, self.allowance = path, name, tally, allowance
        self.is_cut = False

    def __iter__(self) -> Iterator[str]:
        """Bytes that are not UTF-8 are read as Latin-1 (as browsers read it: Windows-1252), and remarked."""
        with opened(self.path) as file:
            first = _read_full(file, HEAD_BYTES)
            encoding = encoding_of(first, inner_name(PurePath(self.name)))
            if encoding is None:
                raise UsageError(
                    f"'{self.path}' is no text in UTF-8, UTF-16 or Latin-1",
                    "convert it, or name rows like .jsonl, .csv or .parquet",
                )
            errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
            decoder = codecs.getincrementaldecoder(encoding)(errors)
            part = first
            while part:
                self.allowance.left -= len(part)
                yield self._mended(decoder.decode(part))
                if self.allowance.is_spent:
                    self.is_cut = bool(file.read(1))
                    break
                part = file.read(CHUNK_BYTES)
            if self.is_cut:
                self.tally.leave_out(f"files beyond {SOURCE_BYTES >> 30} GiB", self.name)
            else:
                yield self._mended(decoder.decode(b"", True))

    def _mended(self, text: str) -> str:
        if text.isascii():
            return text
        text, strange = _ESCAPED.subn(_windows_1252, text)
        if strange:
            self.tally.remark("bytes read as Latin-1, not UTF-8", self.name, strange)
        return text

    def lines(self) -> Iterator[tuple[int, str | None]]:
        """(number, line without its end); None for a line of more than ROW_CHARACTERS. Only a line feed ends a line."""
        number, held, is_long = 1, "", False
        for chunk in self:
            head, *rest = chunk.split("\n")
            held, is_long = ("", True) if is_long or len(held) + len(head) > ROW_CHARACTERS else (held + head, False)
            for part in rest:
                yield number, None if is_long else held
                number, held, is_long = number + 1, part, False
        if (held or is_long) and not self.is_cut:
            yield number, None if is_long else held


def _windows_1252(match: re.Match[str]) -> str:
    byte = bytes([ord(match[0]) - 0xDC00])
    try:
        return byte.decode("cp1252")
    except UnicodeDecodeError:
        return byte.decode("latin-1")

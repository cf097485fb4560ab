"""The same picture in a third of the bytes: vl-convert deflates for speed, a README wants size."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def deflated(png: bytes) -> bytes:
    """`png` with its pixel stream compressed again at the highest level; the pixels and all other chunks stay as they are."""
    chunks = list(_chunks(png))
    pixels = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    out = [SIGNATURE]
    for kind, body in [c for c in chunks if c[0] not in (b"IDAT", b"IEND")]:
        out.append(_chunk(kind, body))
    return b"".join([*out, _chunk(b"IDAT", zlib.compress(pixels, 9)), _chunk(b"IEND", b"")])


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(SIGNATURE)
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        at += size + 12  # length, kind and checksum take four bytes each


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

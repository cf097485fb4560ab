"""Ways to change a file of an artefact: what a disk, an editor or somebody with bad intent leaves."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moe_prism.checkpoint.manifest import MANIFEST, _digest
from moe_prism.store.pack import HEAD, MAGIC

Path_ = tuple[Any, ...]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**40, -0.5, 0.0, 1.5, 1e38, 1e308, float("nan"), float("inf"), "", "x", "full",
    "../x", "/etc/passwd", "a\r\nb", "\ud800", "y" * 100_000, [], {}, [0], [[]], {"a": {}}, [1] * 5000,
]  # fmt: skip
KINDS = ("replace", "remove", "add", "copy", "swap", "flip", "cut", "insert", "deep", "empty")


@dataclass(frozen=True)
class Mutation:
    """at, more: positions, taken modulo what there is; value: a place in VALUES; signed: hashes are made right again afterwards."""

    kind: str
    at: int
    more: int
    value: int
    signed: bool

    def apply(self, path: Path) -> None:
        """Change the file in place."""
        data = path.read_bytes()
        if self.kind in ("replace", "remove", "add", "copy", "swap"):
            form = {".json": self._json, ".npz": self._arrays, ".pack": self._packed}.get(path.suffix, self._header)
            data = form(data)
        elif self.kind == "flip" and data:
            at = self.at % len(data)
            data = data[:at] + bytes([data[at] ^ (1 << self.more % 8)]) + data[at + 1 :]
        elif self.kind == "cut":
            data = data[: self.at % (len(data) + 1)]
        elif self.kind == "insert":
            at = self.at % (len(data) + 1)
            data = data[:at] + data[: self.more % 64] + data[at:]
        elif self.kind == "deep":
            data = b"[" * 100_000 + b"]" * 100_000
        elif self.kind == "empty":
            data = b""
        path.write_bytes(data)

    def _json(self, data: bytes) -> bytes:
        value = json.loads(data)
        return json.dumps(self._changed(value), indent=1, sort_keys=True).encode() + b"\n"

    def _header(self, data: bytes) -> bytes:
        """Of a safetensors file: its header, or numbers of its payload."""
        (length,) = struct.unpack("<Q", data[:8])
        if self.kind in ("copy", "swap"):  # the payload: one number becomes another
            width = 2 if self.kind == "copy" else 4
            start = 8 + length
            at = start + self.at % max(1, (len(data) - start) // width) * width
            new = [b"\x80\x7f", b"\xc0\x7f", b"\xff\x7f", b"\x00\x00", b"\x01\x00"][self.more % 5]
            return data[:at] + (b"\x00" * (width - 2) + new) + data[at + width :]
        text = json.dumps(self._changed(json.loads(data[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    def _arrays(self, data: bytes) -> bytes:
        """Of an .npz file: its header, or one of its arrays."""
        with np.load(io.BytesIO(data)) as file:
            arrays = dict(file)
        name = sorted(arrays)[self.at % len(arrays)]
        own = arrays[name]
        if name == "header" or self.kind == "add":
            arrays["header"] = np.frombuffer(json.dumps(self._changed(json.loads(arrays["header"].tobytes()))).encode(), np.uint8)
        elif self.kind == "remove":
            del arrays[name]
        elif self.kind == "swap":
            arrays[name] = own[..., :-1] if self.more % 2 else own[None]
        elif self.kind == "copy":
            arrays[name] = own.astype(("f8", "i1", "i8", "c8", "U3")[self.more % 5])
        else:
            changed = own.copy().reshape(-1)
            changed[self.more % len(changed)] = (-2, 127, 0, -1, 99)[self.value % 5]
            arrays[name] = changed.reshape(own.shape)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    def _packed(self, data: bytes) -> bytes:
        """Of `experts.pack`: the JSON of its head, with the right sha256 of it."""
        (length,) = struct.unpack("<Q", data[HEAD - 8 : HEAD])
        text = json.dumps(self._changed(json.loads(data[HEAD : HEAD + length]))).encode()
        head = data[: len(MAGIC)] + hashlib.sha256(text).digest() + struct.pack("<Q", len(text)) + text
        return head + data[len(head) :]

    def _changed(self, value: Any) -> Any:
        places = list(_places(value))
        owner, key = places[self.at % len(places)]
        new = VALUES[self.value % len(VALUES)]
        if self.kind == "remove":
            del owner[key]
        elif self.kind == "add":
            target = owner[key] if isinstance(owner[key], dict | list) else owner
            target.append(new) if isinstance(target, list) else target.update({"more": new})
        elif self.kind == "copy" and isinstance(owner[key], list) and owner[key]:
            owner[key].append(owner[key][self.more % len(owner[key])])
        elif self.kind == "swap":
            other, place = places[self.more % len(places)]
            owner[key] = json.loads(json.dumps(other[place]))
        else:
            owner[key] = new
        return value


mutations = st.builds(
    Mutation,
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 1 << 24),
    more=st.integers(0, 1 << 16),
    value=st.integers(0, len(VALUES) - 1),
    signed=st.booleans(),
)


def sign(folder: Path, name: str) -> None:
    """Make the hashes of a changed file right: that of the file in prism.json, and that of prism.json itself, where there is one."""
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_bytes())
        data = (folder / name).read_bytes()
        if name != MANIFEST and name in value["files"]:
            value["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        value["sha256"] = _digest(value)
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    except (ValueError, TypeError, KeyError, OSError, RecursionError, AttributeError):
        return  # no manifest is left that could be signed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of every value inside, in order."""
    items: Callable[[], Any] = value.items if isinstance(value, dict) else lambda: enumerate(value)
    for key, item in list(items()):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)

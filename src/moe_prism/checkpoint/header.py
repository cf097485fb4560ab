"""Read and check a safetensors header against the file that carries it, before any tensor of it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CorruptError, UsageError

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the format's own limit, in bytes
LIMIT = 2**63  # sizes and offsets are unsigned 64-bit in the format, signed in most readers
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64,
    "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
RESTORE = "restore the file from its source"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin`..`end` are absolute byte positions in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises UsageError for formats torch has no element type for (sub-byte floats)."""
        from .dtypes import TORCH  # a header is checked without torch

        if self.dtype not in TORCH:
            raise UsageError(
                f"tensor '{self.name}' has dtype {self.dtype}, which torch cannot hold", "use an unquantized checkpoint"
            )
        return TORCH[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in file order, free-text metadata, and the position of the first payload byte."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int
    size: int


def read_header(path: Path) -> Header:
    """Header of a safetensors file. Reads at most the header; CorruptError names the file and the byte or tensor."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(MAX_HEADER, size - 8):
                raise corrupt(path, f"byte 0: header size {length} does not fit in a file of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}", RESTORE) from error
    entries = _parse(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = sorted((_info(path, name, entry, 8 + length) for name, entry in entries.items()), key=lambda t: (t.begin, t.end))
    position = 8 + length
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps the one before it" if tensor.begin < position else "leaves a gap before it"
            raise corrupt(path, f"byte {tensor.begin}: tensor '{tensor.name}' {kind} (expected byte {position})")
        position = tensor.end
    if position != size:
        raise corrupt(path, f"byte {min(position, size)}: header describes {position} bytes, the file has {size}")
    return Header(tuple(tensors), metadata, 8 + length, size)


def header_text(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file, its length included, of tensors one behind the other in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.bytes],
        }
        position += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def corrupt(path: Path, what: str) -> CorruptError:
    """The error for a file that is not what its header says."""
    return CorruptError(f"{path.name}: {what}", f"{RESTORE} ({path})")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"byte 8: header is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise corrupt(path, "byte 8: header is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    for name in found:
        name.encode("utf-8")  # lone surrogates pass the JSON parser and break every writer later (UnicodeError is a ValueError)
    return found


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise corrupt(path, "byte 8: __metadata__ is not a map of strings")
    return value


def _info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(path, f"tensor '{name}': entry does not hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise corrupt(path, f"tensor '{name}': unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(path, f"tensor '{name}': shape or data_offsets are not lists of sizes")
    bits = BITS[dtype]
    for n in shape:
        bits *= n
        if bits > LIMIT:
            raise corrupt(path, f"tensor '{name}': its shape overflows 64 bits")
    if bits != (offsets[1] - offsets[0]) * 8:
        raise corrupt(
            path, f"tensor '{name}': {dtype}{shape} needs {bits // 8} bytes, its offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path.name, start + offsets[0], start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < LIMIT for n in value)

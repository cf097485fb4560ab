"""The packed file: every sub-expert of an artefact as one aligned record, with a checksum of each, beside what stays resident.

    magic, sha256 of the JSON, its length, JSON | checksums (uint64) | resident tensors (safetensors) | records | int8 records

Each part begins at a multiple of 4096 bytes. Records are in key order: layer, expert, part. Shapes: L layers, E experts, N parts, d hidden,
r gate neurons per sub-expert.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..checkpoint import LayerStream, check_finite
from ..checkpoint.atomic import raw_bytes
from ..errors import CorruptError, DoesNotFit, UsageError
from ..files import sync_folder
from ..model import MoELayer, find_layers
from ..offload.base import KeySpace
from ..schema import check, decode
from ..schema.pack import PackForm
from ..schema.read import one_line
from .checksum import checksum
from .layout import ALIGN, DTYPES, RecordLayout, padded
from .plane_layout import PlaneLayout, PlaneStorage

MAGIC = b"PRISMPK1"
HEAD = len(MAGIC) + 32 + 8
AGAIN = "remove it and it is written again on first use"
Progress = Callable[[int, int], None]
Layout = RecordLayout | PlaneLayout


@dataclass(frozen=True)
class Pack:
    """An opened packed file: where every record lies. `resident[layer]`: gate neuron rows and biases of the layer."""

    path: Path
    layout: Layout
    space: KeySpace
    source: dict[str, str]  # sha256 of the weight files it was made of
    sums: NDArray[np.uint64]  # [records], then [int8 records] if there are any
    start: int
    low_start: int  # 0 = no int8 records
    resident: list[dict[str, Tensor]]

    @property
    def has_low(self) -> bool:
        return self.low_start > 0

    def place(self, key: int, low: bool) -> int:
        """Byte offset of a record."""
        return self.low_start + key * self.layout.low_bytes if low else self.start + key * self.layout.bytes

    @cached_property
    def bytes(self) -> int:
        end = self.low_start + len(self.space) * self.layout.low_bytes if self.has_low else 0
        return max(end, self.start + len(self.space) * self.layout.bytes)


def weight_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """name -> sha256 of the weight files of an artefact; its packed files are no part of it."""
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def write_pack(
    folder: str | Path,
    path: str | Path,
    manifest: Mapping[str, Any],
    *,
    parts: int | None = None,
    low: bool = False,
    planes: PlaneStorage | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the packed file of an artefact, complete or not at all, one layer in memory at a time.

    parts: records per expert, default the artefact's sub-experts; 1 for whole experts. low: int8 records as well. planes: nested planes
    in the place of weights, two records per sub-expert. Raises UsageError for layers of different shapes or a dtype that cannot be
    packed, DoesNotFit if the disk is full.
    """
    stream = LayerStream(folder)
    layers = find_layers(stream.model)
    parts = (manifest["n_sub"] if parts is None else parts) * (1 if planes is None else PlaneLayout.planes)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w+b") as file:
            _write(file, stream, layers, _outline(stream, layers, manifest, parts, low, planes), progress)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DoesNotFit(f"cannot write '{path}': {error.strerror}", "give another place with --expert-file") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Outline:
    """Where everything of a packed file goes, before any record is made."""

    layout: Layout
    parts: int
    count: int  # records of a layer
    layers: int
    blob: bytes  # the resident tensors
    facts: dict[str, Any]
    low: bool  # int8 records as well

    @property
    def total(self) -> int:
        """Records of the file, int8 ones not counted."""
        return self.layers * self.count

    @property
    def sums_at(self) -> int:
        return padded(HEAD + len(json.dumps(self.facts)) + 400)  # the facts grow by the offsets below

    @property
    def blob_at(self) -> int:
        return padded(self.sums_at + 8 * self.total * (1 + self.low))

    @property
    def start(self) -> int:
        return padded(self.blob_at + len(self.blob))

    @property
    def low_start(self) -> int:
        return self.start + self.total * self.layout.bytes if self.low else 0

    @property
    def end(self) -> int:
        return max(self.start + self.total * self.layout.bytes, self.low_start + self.total * self.layout.low_bytes * self.low)


def _outline(
    stream: LayerStream,
    layers: list[MoELayer],
    manifest: Mapping[str, Any],
    parts: int,
    low: bool,
    planes: PlaneStorage | None,
) -> _Outline:
    """UsageError if the layers cannot be packed."""
    layout, resident = _survey(stream, layers, manifest, parts, planes)
    if low and layout.low_bytes > layout.bytes:
        raise UsageError("these sub-experts are too small for int8 records to save anything", "leave --int8-budget out")
    blob = save_tensors({f"{i}.{name}": t.contiguous() for i, own in enumerate(resident) for name, t in own.items()})
    facts: dict[str, Any] = {
        "format": 1,
        "source": weight_files(manifest),
        "layers": len(layers),
        "experts": layers[0].num_experts,
        "parts": parts,
        "layout": layout.to_json(),
    }
    return _Outline(layout, parts, layers[0].num_experts * parts, len(layers), blob, facts, low)


def _write(file: BinaryIO, stream: LayerStream, layers: list[MoELayer], outline: _Outline, progress: Progress | None) -> None:
    """Records first and the head last: a file whose writing was interrupted has no head."""
    layout, count = outline.layout, outline.count
    sums = np.zeros(outline.total * (1 + outline.low), np.uint64)
    for number, layer in enumerate(layers):
        with stream.module(layer.name, disk_dtype=True):
            records = layout.records(layer, outline.parts)
        forms = [(records, outline.start, layout.bytes, 0)]
        if outline.low:
            assert isinstance(layout, RecordLayout)
            forms.append((layout.lowered(records), outline.low_start, layout.low_bytes, outline.total))
        for rows, base, size, offset in forms:
            for i, row in enumerate(rows.numpy()):
                sums[offset + number * count + i] = checksum(row.view(np.uint64))
            file.seek(base + number * count * size)
            file.write(raw_bytes(rows))
        if progress:
            progress(number + 1, len(layers))
    where = {"sums_at": outline.sums_at, "blob_at": outline.blob_at, "blob": len(outline.blob)}
    facts = outline.facts | where | {"start": outline.start, "low_start": outline.low_start}
    facts["small"] = hashlib.sha256(sums.tobytes() + outline.blob).hexdigest()
    text = json.dumps(facts).encode()
    file.seek(outline.blob_at)
    file.write(outline.blob)
    file.seek(outline.sums_at)
    file.write(sums.tobytes())
    file.seek(0)
    file.write(MAGIC + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text)
    file.truncate(outline.end)


def _survey(
    stream: LayerStream,
    layers: list[MoELayer],
    manifest: Mapping[str, Any],
    parts: int,
    planes: PlaneStorage | None,
) -> tuple[Layout, list[dict[str, Tensor]]]:
    """The layout all layers share, and their resident tensors; layers come into memory one by one."""
    layouts: list[Layout] = []
    resident = []
    for layer in layers:
        if planes is None and layer.width % parts:
            raise UsageError(f"{layer.width} neurons of '{layer.name}' do not split into {parts} parts", "choose another number")
        with stream.module(layer.name, disk_dtype=True):
            layouts.append(RecordLayout.of(layer, parts) if planes is None else PlaneLayout.of(layer, parts, planes))
            resident.append(gate_rows(layer, manifest["n_sub"], manifest["gates"]))
    if len(set(layouts)) > 1 or len({layer.num_experts for layer in layers}) > 1:
        raise UsageError("the MoE layers of this model have different shapes", "it cannot run from a packed file")
    if layouts[0].dtype not in DTYPES:
        raise UsageError(f"weights of type {layouts[0].dtype} cannot be packed", f"use one of: {', '.join(DTYPES)}")
    return layouts[0], resident


def gate_rows(layer: MoELayer, n_sub: int, gates: int) -> dict[str, Tensor]:
    """Copies of the gate neurons' rows of gate, up, down [E, N r, d] (as stored) and their biases [E, N r], and down_bias [E, d]."""
    block = layer.width // n_sub
    ids = (torch.arange(n_sub)[:, None] * block + torch.arange(gates)[None, :]).flatten()
    found = {"up": layer.up[:, ids], "down": layer.down[:, :, ids].transpose(1, 2), "down_bias": layer.down_bias}
    found |= {"gate": layer.gate[:, ids]} if layer.gate is not None else {}
    found |= {"up_bias": layer.up_bias[:, ids]} if layer.up_bias is not None else {}
    found |= {"gate_bias": layer.gate_bias[:, ids]} if layer.gate_bias is not None else {}
    return {name: t.detach().clone().contiguous() for name, t in found.items() if t is not None}


def open_pack(path: str | Path, manifest: Mapping[str, Any]) -> Pack:
    """Read and check everything but the records. CorruptError if the file is damaged or was made of other weights."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            facts, sums, blob = _read(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}", AGAIN) from error
    if facts["source"] != weight_files(manifest):
        raise CorruptError(f"{path} was made of other weights than those beside it", AGAIN)
    layout = _layout(facts["layout"])
    space = KeySpace(facts["layers"], facts["experts"], facts["parts"], layout.planes)
    resident = _resident(path, blob, space.layers)
    words = np.frombuffer(sums, np.uint64)
    pack = Pack(path, layout, space, facts["source"], words, facts["start"], facts["low_start"], resident)
    if size != pack.bytes:
        raise CorruptError(f"{path} has {size} bytes instead of {pack.bytes}", AGAIN)
    ends = facts["blob_at"] + facts["blob"], facts["start"] + len(space) * pack.layout.bytes
    if facts["start"] % ALIGN or facts["low_start"] % ALIGN or facts["start"] < ends[0] or 0 < facts["low_start"] < ends[1]:
        raise CorruptError(f"{path}: its parts do not lie behind each other", AGAIN)
    return pack


def _layout(facts: Mapping[str, Any]) -> Layout:
    return PlaneLayout(**facts) if "group" in facts else RecordLayout(**facts)


def check_fits(pack: Pack, layers: Sequence[MoELayer], n_sub: int, gates: int) -> None:
    """CorruptError for records or resident tensors that are not those of these layers: compiled code trusts their shapes."""
    parts, layout = pack.space.parts, pack.layout
    for layer, resident in zip(layers, pack.resident, strict=False):
        kind = (layer.hidden, layer.width, layer.gate is not None, layer.up_bias is not None, layer.num_experts)
        wide = (layer.num_experts, n_sub * gates)
        rows = {"gate": layer.gate is not None, "up": True, "down": True}
        wanted: dict[str, tuple[int, ...]] = {name: (*wide, layer.hidden) for name, there in rows.items() if there}
        wanted |= {name: wide for name in ("gate_bias", "up_bias") if getattr(layer, name) is not None}
        wanted |= {"down_bias": (layer.num_experts, layer.hidden)} if layer.down_bias is not None else {}
        fits = kind == (
            layout.hidden,
            layout.block * parts // layout.planes,
            layout.has_gate,
            layout.has_bias,
            pack.space.experts,
        )
        right = {name: tuple(t.shape) for name, t in resident.items()} == wanted
        if len(layers) != pack.space.layers or not fits or not right:
            raise CorruptError(f"{pack.path} does not fit '{layer.name}'", AGAIN)
        for name, tensor in resident.items():
            if tensor.dtype != layout.torch_dtype:
                raise CorruptError(
                    f"{pack.path}: '{name}' of '{layer.name}' is {tensor.dtype}, its records {layout.dtype}", AGAIN
                )
            check_finite(name, tensor, pack.path.name)


def _resident(path: Path, blob: bytes, layers: int) -> list[dict[str, Tensor]]:
    """The resident tensors of every layer, by their names in the file: `<layer>.<tensor>`."""
    found: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    try:
        tensors = load_tensors(blob)
    except SafetensorError as error:
        raise CorruptError(f"{path} has damaged tables: {one_line(str(error), 160)}", AGAIN) from error
    for name, tensor in tensors.items():
        layer, _, short = name.partition(".")
        if not (layer.isascii() and layer.isdigit() and len(layer) < 7 and int(layer) < layers):
            raise CorruptError(f"{path}: '{one_line(name)}' belongs to none of {layers} layers", AGAIN)
        found[int(layer)][short] = tensor
    return found


def _read(path: Path, file: BinaryIO) -> tuple[dict[str, Any], bytes, bytes]:
    """(facts, checksums, resident tensors), all verified."""
    head = file.read(HEAD)
    length = int.from_bytes(head[-8:], "little")
    if head[: len(MAGIC)] != MAGIC or length > 1 << 20:
        raise CorruptError(f"{path} is no packed file of experts", AGAIN)
    text = file.read(length)
    if hashlib.sha256(text).digest() != head[len(MAGIC) : -8]:
        raise CorruptError(f"{path} has a damaged header", AGAIN)
    facts = check(PackForm, decode(text, f"{path}: header", AGAIN), f"{path}: header", AGAIN).model_dump()
    count = facts["layers"] * facts["experts"] * facts["parts"] * (2 if facts["low_start"] else 1)
    size = os.fstat(file.fileno()).st_size
    if facts["sums_at"] + 8 * count > size or facts["blob_at"] + facts["blob"] > size:
        raise CorruptError(f"{path} has {size} bytes, its tables end behind them", AGAIN)
    file.seek(facts["sums_at"])
    sums = file.read(8 * count)
    file.seek(facts["blob_at"])
    blob = file.read(facts["blob"])
    if hashlib.sha256(sums + blob).hexdigest() != facts["small"]:
        raise CorruptError(f"{path} has damaged tables", AGAIN)
    return facts, sums, blob

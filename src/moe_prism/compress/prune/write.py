"""Shards, index and config.json of a checkpoint whose experts were edited: what every form of pruning writes alike."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...checkpoint import Journal, OutputFolder, TensorInfo, check_finite, copy_companions
from ...checkpoint.atomic import raw_bytes
from ...checkpoint.mtp import CONFIG_KEYS as MTP_KEYS
from ...checkpoint.shards import INDEX, Source
from ...schema import read_json
from ...schema.config import INDEX_BOUNDS
from ...schema.read import RESTORE

Progress = Callable[[int, int], None]
"""(bytes written, bytes in total)."""


class Planned:
    """A tensor of the output: its entry in a header, and the layer whose edit makes it, if one does."""

    def __init__(self, info: TensorInfo, shape: Sequence[int], owner: int | None) -> None:
        self.info, self.shape, self.owner = info, list(shape), owner
        self.bytes = info.bytes * _volume(shape) // max(1, _volume(info.shape))


class ShardWriter(ABC):
    """What the shards of an edited checkpoint hold."""

    @abstractmethod
    def plan(self, shard: str) -> list[Planned]:
        """The tensors an output shard holds, in the order of the source's."""

    @abstractmethod
    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        """Each of them once, in any order, with what it holds."""

    @abstractmethod
    def read_back(self, folder: Path) -> None:
        """UsageError where the first changed layer of what was written is not what it should be."""


def by_owner(
    shard: str,
    tensors: Sequence[Planned],
    kept: Callable[[TensorInfo], Tensor],
    made: Callable[[int], Mapping[str, Tensor]],
) -> Iterator[tuple[Planned, Tensor]]:
    """The values of tensors, one layer's edit at a time. kept: of a tensor that no edit makes; made: a layer's, by name."""
    for t in tensors:
        if t.owner is None:
            data = kept(t.info)
            check_finite(t.info.name, data, shard)
            yield t, data
    for i in sorted({t.owner for t in tensors if t.owner is not None}):
        found = made(i)
        yield from ((t, found[t.info.name]) for t in tensors if t.owner == i)


def write_checkpoint(
    source: Source, config: bytes, writer: ShardWriter, out: OutputFolder, journal: Journal, progress: Progress | None = None
) -> None:
    """An edited checkpoint in `out.work`: the companions of `source`, its new config.json, and the shards, read back at the end."""
    copy_companions(source.folder, out, source)
    out.write_bytes("config.json", config)
    write_shards(source, writer, out, journal, progress)
    writer.read_back(out.work)


def write_shards(
    source: Source, writer: ShardWriter, out: OutputFolder, journal: Journal, progress: Progress | None = None
) -> None:
    """Write every shard that holds something, a unit of `journal` each, and the index where the source has one."""
    plan = {shard: writer.plan(shard) for shard in source.shards()}
    plan = {shard: tensors for shard, tensors in plan.items() if tensors}
    sizes = {shard: sum(t.bytes for t in tensors) for shard, tensors in plan.items()}
    pending = [shard for shard in plan if not journal.done(shard)]
    out.hashes.update({shard: journal.sha256(shard) for shard in plan if shard not in pending})
    out.require_space(sum(sizes[shard] for shard in pending))
    for shard in pending:
        with out.stage(shard) as file:
            _write(source.header(shard).metadata, plan[shard], writer.values(shard, plan[shard]), file)
        journal.finish(shard, out.hashes[shard])
        if progress:
            progress(sum(sizes[s] for s in plan if journal.done(s)), sum(sizes.values()))
    if (source.folder / INDEX).is_file():
        out.write_bytes(INDEX, _index(source.folder / INDEX, plan))


def _write(
    metadata: Mapping[str, str], tensors: Sequence[Planned], values: Iterator[tuple[Planned, Tensor]], file: BinaryIO
) -> None:
    position, header, begins = 0, dict[str, Any](), dict[str, int]()
    for t in tensors:
        header[t.info.name] = {"dtype": t.info.dtype, "shape": t.shape, "data_offsets": [position, position + t.bytes]}
        begins[t.info.name] = position
        position += t.bytes
    text = json.dumps(({"__metadata__": metadata} if metadata else {}) | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    for t, data in values:
        file.seek(start + begins[t.info.name])
        file.write(raw_bytes(data))


def config_text(raw: dict[str, Any], section: dict[str, Any], drop_mtp: bool) -> bytes:
    """config.json again, without MTP layers where those are dropped. section: the part of `raw` for the text model."""
    if drop_mtp:
        for part in (raw, section):
            part.update({key: 0 for key in MTP_KEYS if key in part})
    return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"


def text_section(config: Any, text: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the text model: the whole of it, or a part of a part (Qwen3-Omni)."""
    if config is text:
        return raw
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    key = next((key for key, part in inner.items() if part is text or _holds(part, text)), None)
    return text_section(inner[key], text, raw[key]) if key in raw else raw


def _holds(config: Any, text: Any) -> bool:
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
    return any(part is text or _holds(part, text) for part in parts)


def _volume(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _index(path: Path, plan: Mapping[str, Sequence[Planned]]) -> bytes:
    found = read_json(path, RESTORE, INDEX_BOUNDS).get("metadata")
    metadata = found if isinstance(found, dict) else {}
    metadata |= {"total_size": sum(t.bytes for tensors in plan.values() for t in tensors)}
    weight_map = {t.info.name: shard for shard, tensors in plan.items() for t in tensors}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2).encode() + b"\n"

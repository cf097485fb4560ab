"""A safetensors checkpoint on disk, read-only and fully checked before the first tensor is handed out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CorruptError, UsageError
from ..schema import check, is_file_name
from ..schema import read_json as read_value
from ..schema.config import INDEX_BOUNDS, IndexForm, bounds_of
from .header import RESTORE, Header, TensorInfo, corrupt, read_header
from .links import inside

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
LEGACY = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
Bytes = bytes  # `Source.bytes` is a number
STACKED = 3  # dimensions of a tensor that holds several experts
TOGETHER = 1 << 26  # bytes of such a tensor that are read at a time, and a row at least
BLOCK = 1 << 24  # bytes copied at a time where no value is looked at


class Source:
    """`model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Opening reads every header and nothing else. Raises UsageError when there is no safetensors checkpoint, CorruptError naming
    the file and byte or tensor when sizes, offsets, the index or the shards disagree, or when the index leads out of the folder.
    Files are only ever opened for reading.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UsageError(f"'{folder}' is not a folder", "give a local folder that holds model.safetensors")
        self.index_file = INDEX if (self.folder / INDEX).is_file() and not (self.folder / SINGLE).is_file() else None
        weight_map = self._weight_map() if self.index_file else None
        files = sorted(set(weight_map.values())) if weight_map is not None else self._single()
        self._headers: dict[str, Header] = {name: read_header(self._path(name)) for name in files}
        self._infos: dict[str, TensorInfo] = {}
        for (
            header
        ) in self._headers.values():  # in the order of transformers: of two copies of a tensor it takes the one it meets last
            self._infos |= {info.name: info for info in header.tensors}
        if weight_map is not None:
            self._check_index(weight_map)

    @property
    def bytes(self) -> int:
        """Bytes of all shard files, headers included."""
        return sum(header.size for header in self._headers.values())

    def names(self) -> list[str]:
        return list(self._infos)

    def shards(self) -> list[str]:
        """File names, sorted."""
        return list(self._headers)

    def header(self, shard: str) -> Header:
        return self._headers[shard]

    def is_read(self, info: TensorInfo) -> bool:
        """Whether it is this copy that counts: a shard laid over others may hold a tensor again."""
        return self._infos[info.name] is info

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and place of one tensor; UsageError if there is none of this name."""
        if name not in self._infos:
            raise UsageError(f"'{self.folder}' has no tensor '{name}'", "compare config.json with the checkpoint")
        return self._infos[name]

    def tensor(self, name: str) -> Tensor:
        """A fresh CPU tensor with the dtype and shape on disk. Writing to it never reaches the file."""
        from .tensors import read_tensor  # headers are checked without torch

        info = self.info(name)
        return read_tensor(self.folder / info.shard, info)

    def has_rows(self, name: str) -> bool:
        """Whether `rows` can read a part of this tensor: one of three dimensions or more, such as all experts of a layer in one."""
        shape = self.info(name).shape
        return len(shape) >= STACKED and shape[0] > 0

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """`tensor(name)[first:last]`, of which no more is read."""
        from .tensors import read_rows

        info = self.info(name)
        return read_rows(self.folder / info.shard, info, first, last)

    def stored_rows(self, name: str, first: int, last: int) -> Tensor:
        """The same in the dtype of its `info`: what is written of it."""
        return self.rows(name, first, last).to(self.info(name).torch_dtype)

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """All of a tensor: (where its rows begin, these), few at a time where that can be."""
        if not self.has_rows(name):
            yield 0, self.tensor(name)
            return
        info = self.info(name)
        count = info.shape[0]
        together = max(1, TOGETHER * count // max(1, info.bytes))
        for first in range(0, count, together):
            yield first, self.rows(name, first, min(first + together, count))

    def blocks(self, info: TensorInfo) -> Iterator[Bytes]:
        """The bytes of this copy of a tensor, whatever they mean."""
        with (self.folder / info.shard).open("rb") as file:
            file.seek(info.begin)
            for start in range(0, info.bytes, BLOCK):
                yield file.read(min(BLOCK, info.bytes - start))

    def stored(self, info: TensorInfo) -> Tensor:
        """This copy of a tensor, in the dtype of `info`: what is written of it."""
        from .tensors import read_tensor

        return read_tensor(self.folder / info.shard, info)

    def header_bytes(self, shard: str) -> Bytes:
        """What stands before the first payload byte of a shard."""
        with (self.folder / shard).open("rb") as file:
            return file.read(self.header(shard).data_start)

    def index_bytes(self) -> Bytes:
        """The index, where `index_file` says that there is one."""
        return (self.folder / INDEX).read_bytes()

    def config(self) -> dict[str, Any]:
        """The JSON value of config.json; see `read_json`."""
        return read_json(self.folder / "config.json")

    def config_bytes(self) -> Bytes:
        """config.json as it is written again."""
        return inside(self.folder / "config.json").read_bytes()

    def _single(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if any((self.folder / name).exists() for name in LEGACY):
            raise UsageError(
                f"'{self.folder}' only has weights in a pickle format, which can run code when opened",
                "convert it where you trust it: load with transformers and call save_pretrained, then give that folder",
            )
        raise UsageError(f"'{self.folder}' has no {SINGLE} and no {INDEX}", "give the folder of a safetensors checkpoint")

    def _path(self, name: str) -> Path:
        path = inside(self.folder / name)
        if not path.is_file():
            raise CorruptError(f"{name} is named by the index but missing from '{self.folder}'", "download the missing shard")
        return path

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        weight_map = check(IndexForm, read_value(inside(path), RESTORE, INDEX_BOUNDS), str(path), RESTORE).weight_map
        for name, shard in weight_map.items():
            if not is_file_name(shard) or not shard.endswith(".safetensors"):
                raise corrupt(
                    path, f"tensor '{name}' points to {str(shard)[:80]!r}, which is not a safetensors file of this folder"
                )
        return weight_map

    def _check_index(self, weight_map: dict[str, str]) -> None:
        path = self.folder / INDEX
        for name, shard in weight_map.items():
            if all(info.name != name for info in self._headers[shard].tensors):
                raise corrupt(path, f"tensor '{name}' is not in {shard}")
            if self._infos[name].shard != shard:
                raise corrupt(
                    path, f"names {shard} for tensor '{name}', of which transformers reads the copy in {self._infos[name].shard}"
                )
        for name, info in self._infos.items():
            if name not in weight_map:
                raise corrupt(self.folder / info.shard, f"tensor '{name}' is not in the index")
        for file in sorted(self.folder.iterdir()):
            if SHARD_NAME.fullmatch(file.name) and file.name not in self._headers:
                raise corrupt(file, "this shard is not in the index")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. UsageError where there is no such file, CorruptError where it is no JSON object."""
    if not path.is_file():
        raise UsageError(f"'{path.parent}' has no readable {path.name}", "give a folder written by save_pretrained")
    value = read_value(inside(path), RESTORE, bounds_of(path.name))
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is not a JSON object", RESTORE)
    return value

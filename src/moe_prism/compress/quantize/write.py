"""A checkpoint whose experts are packed as compressed-tensors has them: `X.weight_packed`, `X.weight_scale`, `X.weight_shape`.

Everything else is copied, but what a preparation changes. Shard by shard; a finished shard is a unit of the journal.
Peak memory: one shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite, copy_companions
from ...checkpoint.formats.bits import pack_words
from ...checkpoint.shards import INDEX
from ...errors import UsageError
from ...heap import return_freed_pages
from ...model import MoELayer
from ..codec.rtn import Rtn
from .prepare import Preparation

PACKED_WIDTHS = (4, 8)
"""What the readers of this format take."""
WEIGHT = ".weight"
ENDS = ("packed", "scale", "shape")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packing:
    """How experts are packed: `rtn` of `bits` in groups of `group` inputs."""

    codec: Rtn
    bits: int
    group: int

    def check(self, names: Sequence[str], infos: Mapping[str, TensorInfo]) -> None:
        """UsageError for what compressed-tensors cannot say."""
        if self.bits not in PACKED_WIDTHS:
            raise UsageError(f"compressed-tensors packs no {self.bits} bits", "give rtn:bits=4 or rtn:bits=8")
        if not self.codec.symmetric:
            raise UsageError("transformers 5.19 reads no zeros of packed experts", "leave symmetric=false out")
        for name in names:
            shape = infos[name].shape
            if len(shape) != 2 or not name.endswith(WEIGHT):
                raise UsageError(
                    f"'{name}' {tuple(shape)} is no matrix of one expert, which is what compressed-tensors stores",
                    "quantize this family with the tool that releases it",
                )
            if shape[1] % self.group:
                raise UsageError(f"{shape[1]} inputs of '{name}' are no groups of {self.group}", "give a group that divides them")

    def packed(self, name: str, matrix: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
        """The tensors that stand for one matrix [o, i]. gram [i, i]: of its inputs, where errors are fed back."""
        planes = self.codec.encode(matrix, self.bits, self.group, gram)
        codes, numbers = self.codec.unpacked(planes, self.bits)
        return {
            f"{name}_packed": pack_words(codes, self.bits),
            f"{name}_scale": numbers["scale"].bfloat16(),
            f"{name}_shape": torch.tensor(matrix.shape, dtype=torch.int64),
        }

    def bytes(self, shape: Sequence[int]) -> int:
        """Of one matrix on disk."""
        rows, columns = shape
        return 4 * rows * -(-columns * self.bits // 32) + 2 * rows * (columns // self.group) + 16

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. ignored: modules that stay as they are."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
        }


TRIES = 8  # copies of a matrix while scales are tried
FREED, MOST_FREED = 16, 192 << 20  # copies that are free again and stay with the allocator, and bytes of them at most
"""They go back after so many tensors: what is packed lies between them, and a file's holes would come to as much as the file."""


class PackedCheckpoint:
    """What becomes of every tensor of a source. UsageError where its experts are not stored one by one.

    prepared: what happens to them before, nothing unless it is set.
    """

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], packing: Packing) -> None:
        self.stream, self.packing, self.source = stream, packing, stream.source
        self.prepared = Preparation()
        owned = [name for layer in layers for owner in layer.owners for name in stream.disk_names(owner)]
        self.infos = {name: self.source.info(name) for name in self.source.names()}
        self.experts = [name for name in owned if len(self.infos[name].shape) > 1]
        packing.check(self.experts, self.infos)

    def bytes(self) -> tuple[int, int]:
        """Of the experts: as they are, and as they are written."""
        return sum(self.infos[n].bytes for n in self.experts), sum(self.packing.bytes(self.infos[n].shape) for n in self.experts)

    def working_bytes(self) -> dict[str, int]:
        """What writing holds at once, by part: the largest file as it will be, and a matrix that is packed, in float32 and in tries."""
        experts = set(self.experts)
        files = [
            sum(
                self.packing.bytes(info.shape) if info.name in experts else info.bytes
                for info in self.source.header(shard).tensors
                if self.source.is_read(info)
            )
            for shard in self.source.shards()
        ]
        matrix = max((torch.Size(self.infos[name].shape).numel() for name in self.experts), default=0)
        own = matrix * torch.float32.itemsize
        return {"file_bytes": max(files, default=0), "packing_bytes": TRIES * own + min(FREED * own, MOST_FREED)}

    def errors(self) -> Iterator[tuple[str, float, float]]:
        """(name, squared error, squared size) of every matrix."""
        for name in self.experts:
            matrix, codec = self.prepared.changed(name, self.source.tensor(name).float()), self.packing.codec
            planes = codec.encode(matrix, self.packing.bits, self.packing.group, self.prepared.gram(name))
            found = codec.decode(planes, self.packing.bits)
            yield name, float((found - matrix).double().square().sum()), float(matrix.double().square().sum())

    def write(self, out: OutputFolder, journal: Journal, progress: Progress) -> None:
        """Everything into `out.work`. CorruptError names a source tensor that is not finite."""
        copy_companions(self.source.folder, out, self.source)
        config = self.source.config() | {"quantization_config": self.packing.settings(self._ignored())}
        out.write_bytes("config.json", json.dumps(config, indent=2).encode() + b"\n")
        shards, experts = self.source.shards(), set(self.experts)
        place: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            names = [info.name for info in self.source.header(shard).tensors if self.source.is_read(info)]
            place |= {name: shard for own in names for name in ([f"{own}_{end}" for end in ENDS] if own in experts else [own])}
            if journal.done(shard):
                out.hashes[shard] = journal.sha256(shard)
            else:
                journal.finish(shard, self._shard(shard, names, experts, out))
                return_freed_pages()
            progress(number, len(shards))
        if (self.source.folder / INDEX).is_file():
            out.write_bytes(INDEX, json.dumps({"metadata": {}, "weight_map": dict(sorted(place.items()))}, indent=2).encode())

    def _shard(self, shard: str, names: Sequence[str], experts: set[str], out: OutputFolder) -> str:
        tensors: dict[str, Tensor] = {}
        for number, name in enumerate(names, 1):
            tensor = self.source.tensor(name)
            check_finite(name, tensor, shard)
            tensor = self.prepared.changed(name, tensor)
            tensors |= self.packing.packed(name, tensor, self.prepared.gram(name)) if name in experts else {name: tensor}
            if number % FREED == 0:
                return_freed_pages()
        return out.save_tensors(shard, tensors, {"format": "pt"})

    def _ignored(self) -> list[str]:
        """Modules with matrices that are not packed."""
        kept = set(self.infos) - set(self.experts)
        return sorted(n.removesuffix(WEIGHT) for n in kept if n.endswith(WEIGHT) and len(self.infos[n].shape) > 1)

"""A checkpoint again with other values in a few of its tensors: what training a router writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import Journal, LayerStream, OutputFolder, check_finite
from ...checkpoint.convert import ADVICE
from ...errors import UsageError
from ..prune.write import Planned, Progress, ShardWriter, write_checkpoint


class RowsCheckpoint(ShardWriter):
    """values: parameters by their full names, written in the types that they have on disk. Every other byte stays."""

    def __init__(self, stream: LayerStream, values: Mapping[str, Tensor]) -> None:
        self.stream = stream
        named, wanted = stream.disk_form(dict(values)), set(stream.feeds(values))
        if different := sorted(set(named) ^ wanted):
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        self.named = {name: tensor.to(stream.source.info(name).torch_dtype) for name, tensor in named.items()}

    def write(self, out: OutputFolder, journal: Journal, progress: Progress) -> None:
        """Everything into `out.work`, shard by shard; a finished shard is a unit of `journal`."""
        source = self.stream.source
        write_checkpoint(source, source.config_bytes(), self, out, journal, progress)

    def plan(self, shard: str) -> list[Planned]:
        return [Planned(info, info.shape, None) for info in self.stream.source.header(shard).tensors]

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        for t in tensors:
            data = self.named.get(t.info.name)
            if data is None:
                data = self.stream.source.stored(t.info)
            check_finite(t.info.name, data, shard)
            yield t, data

    def read_back(self, folder: Path) -> None:
        written = LayerStream(folder).source
        wrong = next((name for name, tensor in self.named.items() if not torch.equal(written.tensor(name), tensor)), None)
        if wrong:
            raise UsageError(f"tensor '{wrong}' does not come back from the folder", ADVICE)

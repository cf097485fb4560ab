"""The source of a refactor: a safetensors folder, streamed one layer at a time, or a GGUF file, held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Journal, LayerStream, OutputFolder, check_finite
from ..model import MoELayer, find_layers, load_model, on_disk
from ..progress import Update
from .rewrite import rewrite_gguf, rewrite_shards


class Weights:
    """`layers` in model order; `loaded(layer)` brings one layer's experts in (float32); `rewrite` writes the permuted checkpoint."""

    def __init__(self, where: Path | str) -> None:
        self.path = on_disk(where)
        self.stream = None if self.path.is_file() else LayerStream(self.path, torch.float32)
        self.model: Any = self.stream.model if self.stream else load_model(self.path, torch.float32)
        self.layers = find_layers(self.model)

    @property
    def bytes_per_weight(self) -> int:
        """Of the written checkpoint's expert weights."""
        if self.stream is None:
            return torch.bfloat16.itemsize
        return self.stream.source.info(self.stream.disk_names(self.layers[0].name)[0]).torch_dtype.itemsize

    def check_rewritable(self) -> None:
        """UsageError before hours of work where some layer's experts could not be written again."""
        if self.stream:
            for layer in self.layers:
                for owner in layer.owners:
                    self.stream.check_rewritable(owner)

    def check_finite(self) -> None:
        """CorruptError naming the first tensor with NaN or infinity. A GGUF file is checked when it is written."""
        if self.stream:
            for name in self.stream.source.names():
                check_finite(name, self.stream.source.tensor(name), self.stream.source.info(name).shard)

    @contextmanager
    def loaded(self, layer: MoELayer) -> Iterator[MoELayer]:
        """The layer with its weights in memory; they may be changed inside the block and are forgotten (a folder) or restored after."""
        if self.stream:
            with self.stream.module(layer.name), torch.no_grad():
                yield layer
            return
        saved = {name: p.detach().clone() for name, p in layer.module.named_parameters()}
        try:
            with torch.no_grad():
                yield layer
        finally:
            with torch.no_grad():
                for name, p in layer.module.named_parameters():
                    p.copy_(saved[name])

    def rewrite(self, folder: OutputFolder, journal: Journal, permute: Callable[[MoELayer], Tensor], update: Update) -> None:
        """Write the checkpoint again with these orders of neurons."""
        if self.stream:
            rewrite_shards(self.stream, permute, folder, journal, self.layers, update)
        else:
            rewrite_gguf(self.path, permute, folder, torch.bfloat16)
            update(1, 1)

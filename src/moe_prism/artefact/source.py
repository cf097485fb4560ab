"""The source of a refactor: a safetensors folder, streamed one layer at a time, or a GGUF file, held in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import DequantizedSource, Journal, LayerStream, OutputFolder, check_finite, companion_facts
from ..checkpoint.dequantized import WRITTEN
from ..checkpoint.formats.requantize import Counts
from ..checkpoint.gguf_file import expert_bytes
from ..errors import UsageError
from ..heap import return_large_buffers
from ..model import MoELayer, find_layers, load_model
from ..progress import Update
from .keep_format import QuantizedWriter, neuron_group, quantized, rewrite_quantized, stored_bytes
from .rewrite import rewrite_gguf, rewrite_shards

Keep = Literal["format", "codes"]


class Weights:
    """`layers` in model order; `loaded(layer)` brings one layer's experts in (float32); `rewrite` writes the permuted checkpoint.

    keep: write the source's own format; "codes" refuses to change one of its codes. written: the type of dequantized weights in it, see
    `checkpoint.open_source`; of a GGUF file bf16 where none is named. config: of a GGUF file, instead of what it says itself.
    """

    def __init__(self, where: Path, written: str | None = None, keep: Keep | None = None, config: Any = None) -> None:
        self.written = WRITTEN[written or "bf16"]
        self.path = where
        self.stream = None if self.path.is_file() else LayerStream(self.path, torch.float32, written)
        self.keep = keep
        if keep:
            if self.stream is None:
                raise UsageError(f"'{self.path.name}' is a GGUF file, which is not written again", "leave --keep-format out")
            quantized(self.stream)
        self.model: Any = self.stream.model if self.stream else load_model(self.path, torch.float32, config)
        self.layers = find_layers(self.model)

    @property
    def dequantized(self) -> dict[str, Any] | None:
        """What a manifest says of a quantized source that is written as a plain one, None for any other."""
        source = self.stream.source if self.stream and not self.keep else None
        return source.facts() if isinstance(source, DequantizedSource) else None

    @property
    def companions(self) -> dict[str, Any]:
        """What a manifest says of the files beside the weights."""
        source = self.stream.source if self.stream else None
        return companion_facts(self.path, source.raw if self.keep and isinstance(source, DequantizedSource) else source)

    @property
    def stored_as(self) -> str:
        """The format of the weights: a name of `source_formats`, gguf, or a type."""
        if self.stream is None:
            return "gguf"
        source = self.stream.source
        return (
            source.form.name
            if isinstance(source, DequantizedSource)
            else str(self.stream.model.config.dtype).removeprefix("torch.")
        )

    @property
    def stored_bytes_per_weight(self) -> float:
        """Of the source's own expert weights, scales included."""
        if self.stream is None:
            return expert_bytes(self.path)
        return (
            stored_bytes(self.stream, self.layers[0])
            if isinstance(self.stream.source, DequantizedSource)
            else self.bytes_per_weight
        )

    def neuron_group(self) -> int | None:
        """Neighbouring neurons that share codes or scales in a quantized folder; None where nothing is quantized."""
        if self.stream is None or not isinstance(self.stream.source, DequantizedSource):
            return None
        return math.lcm(*(neuron_group(self.stream, layer) for layer in (self.layers[0], self.layers[-1])))

    @property
    def written_bytes(self) -> int | None:
        """Bytes of the checkpoint that `rewrite` writes; None for a GGUF file."""
        if self.stream is None:
            return None
        return quantized(self.stream).raw.bytes if self.keep else self.stream.source.bytes

    @property
    def bytes_per_weight(self) -> float:
        """Of the written checkpoint's expert weights."""
        if self.stream and self.keep:
            return stored_bytes(self.stream, self.layers[0])
        if self.stream is None:
            return self.written.itemsize
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
            return_large_buffers()  # all of the source passes here, dequantized
            source = self.stream.source
            for name in source.names():
                for first, part in source.parts(name):
                    check_finite(name, part, source.info(name).shard, first)

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

    def rewrite(
        self,
        folder: OutputFolder,
        journal: Journal,
        permute: Callable[[MoELayer], Tensor],
        update: Update,
        counts: Callable[[MoELayer], Counts] | None = None,
    ) -> dict[str, Any] | None:
        """Write the checkpoint again with these orders of neurons. Returns what moving cost where the source's format is kept.

        counts: what errors in the output weights of a layer's neurons count, in its new order; needed where codes may change.
        """
        if self.stream and self.keep:
            writer = QuantizedWriter(self.stream, permute, self.layers, None if self.keep == "codes" else counts)
            return {"format": writer.source.form.name, "moved": self.keep, **rewrite_quantized(writer, folder, journal, update)}
        if self.stream:
            rewrite_shards(self.stream, permute, folder, journal, self.layers, update)
        else:
            rewrite_gguf(self.path, permute, folder, self.written)
            update(1, 1)
        return None

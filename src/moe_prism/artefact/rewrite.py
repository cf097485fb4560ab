"""Write a checkpoint again with the neurons of its experts in another order: same files, names, shapes and function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite, copy_companions, first_non_finite
from ..checkpoint.atomic import raw_bytes
from ..checkpoint.convert import ADVICE, disk_state, quiet
from ..checkpoint.dtypes import TORCH
from ..checkpoint.mapped import DiskPart
from ..checkpoint.shards import SINGLE
from ..errors import UsageError
from ..model import MoELayer, find_layers, load_model, load_tokenizer

Permute = Callable[[MoELayer], Tensor]
"""The neuron order of one layer: perm [E, f], new neuron j of expert e is old neuron perm[e, j]. Asked once per layer."""
Progress = Callable[[int, int], None]
"""(bytes written, bytes in total)."""


def rewrite_shards(
    stream: LayerStream,
    permute: Permute,
    out: OutputFolder,
    journal: Journal,
    layers: Sequence[MoELayer] | None = None,
    progress: Progress | None = None,
) -> None:
    """Copy stream's checkpoint to `out.work` with every layer's neurons reordered; then `write_manifest` and `out.finish()`.

    Shard by shard; a finished shard is a unit of `journal` and is skipped on resume. Headers and all tensors that belong to no
    MoE layer are byte-identical. layers: default `find_layers(stream.model)`. Peak memory: one layer's experts (about twice while
    they are converted). CorruptError names a source tensor that is not finite; DoesNotFit if the disk is too small.
    """
    source = stream.source
    refuse_nested(source.folder, out)
    layers = find_layers(stream.model) if layers is None else layers
    pending = [shard for shard in source.shards() if not journal.done(shard)]
    out.hashes.update({shard: journal.sha256(shard) for shard in source.shards() if shard not in pending})
    out.require_space(sum(source.header(shard).size for shard in pending))
    copy_companions(source.folder, out, source)
    if source.index_file:
        out.write_bytes(source.index_file, source.index_bytes())
    writer = _ShardWriter(stream, permute, layers)
    written = source.bytes - sum(source.header(shard).size for shard in pending)
    for shard in pending:
        with out.stage(shard) as file:
            writer.write(shard, file)
        journal.finish(shard, out.hashes[shard])
        written += source.header(shard).size
        if progress:
            progress(written, source.bytes)


def rewrite_gguf(file: str | Path, permute: Permute, out: OutputFolder, dtype: torch.dtype = torch.bfloat16) -> None:
    """The same from a .gguf file, as one safetensors shard with tokenizer, in `dtype`.

    transformers dequantizes a GGUF file as a whole, so this needs the model in memory and has no units to resume.
    """
    refuse_nested(Path(file), out)
    with quiet():
        model = load_model(file, dtype=dtype)
    for name, tensor in model.state_dict().items():
        check_finite(name, tensor, Path(file).name)
    for layer in find_layers(model):
        layer.permute(_checked(permute(layer), layer))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what is written is dequantized
    save_model(model, out)
    before = {path.name for path in out.work.iterdir()}
    load_tokenizer(file).save_pretrained(out.work)
    for path in sorted(out.work.iterdir()):
        if path.name not in before:
            out.write_bytes(path.name, path.read_bytes())  # again, through fsync and the hash list


def save_model(model: Any, out: OutputFolder) -> None:
    """An in-memory transformers model as `model.safetensors` (its family's names on disk), config.json, generation_config.json.

    CorruptError if a weight is not finite, DoesNotFit if the disk is too small.
    """
    out.save_tensors(SINGLE, disk_state(model), {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    out.write_bytes("config.json", model.config.to_json_string(use_diff=True).encode())
    if getattr(model, "generation_config", None) is not None:
        out.write_bytes("generation_config.json", model.generation_config.to_json_string(use_diff=True).encode())


class _ShardWriter:
    """Writes one output shard at a time: the source's header verbatim, then every tensor at the place it has in the source."""

    def __init__(self, stream: LayerStream, permute: Permute, layers: Sequence[MoELayer]) -> None:
        self.stream, self._permute = stream, permute
        self._layers = {layer.name: layer for layer in layers}
        self._owned = {layer.name: stream.disk_names(layer.name) for layer in layers}
        self._perms: dict[str, Tensor] = {}  # a layer can lie in two shards: asked once, small enough to keep
        self._tried = False

    def write(self, shard: str, file: BinaryIO) -> None:
        header = self.stream.source.header(shard)
        inside = {tensor.name: tensor for tensor in header.tensors if self.stream.source.is_read(tensor)}
        file.write(self.stream.source.header_bytes(shard))
        moved = {name for names in self._owned.values() for name in names}
        for info in header.tensors:
            if info.name not in moved or info.name not in inside:
                self._copy(info, file)
        for layer, names in self._owned.items():
            here = [name for name in names if name in inside]
            if here:
                for part in self._permuted(layer):
                    for name in set(here) & set(part.tensors):
                        file.seek(inside[name].begin + part.bytes_before(name))
                        file.write(raw_bytes(part.tensors[name]))
                    del part  # or it would lie beside the layer that is read next

    def _permuted(self, name: str) -> Iterator[DiskPart]:
        """The layer's tensors in parts."""
        stream, layer = self.stream, self._layers[name]
        with stream.module(name, disk_dtype=True) as module:
            if any(first_non_finite(p) is not None for p in module.parameters()):
                for owned in self._owned[name]:  # read again only to say which tensor on disk it is
                    for first, rows in stream.source.parts(owned):
                        check_finite(owned, rows, stream.source.info(owned).shard, first)
            if not self._tried:
                self._try(name)
            if name not in self._perms:
                self._perms[name] = _checked(self._permute(layer), layer)
            layer.permute(self._perms[name])
            yield from stream.disk_parts(name)

    def _try(self, name: str) -> None:
        """Once per run: an untouched layer must come back with the bytes it has on disk, else the family is not safe."""
        source = self.stream.source
        for part in self.stream.disk_parts(name):
            for disk_name, tensor in part.tensors.items():
                if raw_bytes(tensor) != raw_bytes(part.stored(source, disk_name)):
                    raise UsageError(f"tensor '{disk_name}' changes when transformers loads and saves it", ADVICE)
        self._tried = True

    def _copy(self, info: TensorInfo, file: BinaryIO) -> None:
        file.seek(info.begin)
        if info.dtype in TORCH:
            tensor = self.stream.source.stored(info)
            check_finite(info.name, tensor, info.shard)
            file.write(raw_bytes(tensor))
            return
        for block in self.stream.source.blocks(info):
            file.write(block)


def _checked(perm: Tensor, layer: MoELayer) -> Tensor:
    shape = (layer.num_experts, layer.width)
    good = tuple(perm.shape) == shape and not perm.is_floating_point()
    if not good or not torch.equal(perm.long().sort(1).values, torch.arange(layer.width, device=perm.device).expand(shape)):
        raise UsageError(f"{layer.name}: the neuron order is not a permutation of shape {shape}", "rebuild the partition")
    return perm


def refuse_nested(source: Path, out: OutputFolder) -> None:
    """Replacing OUT must never touch the source: neither may lie in the other."""
    here, there = source.resolve(), out.out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(f"output '{out.out}' and source '{source}' overlap", "choose an output path outside the source")

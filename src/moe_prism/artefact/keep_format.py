"""Write a quantized checkpoint again in its own format: neurons in another order, every header and every other byte as it was.

Nothing here knows how a family stores its experts. What a permutation does to the matrices on disk is seen by sending row numbers and
column numbers through the family's own conversion, instead of weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import DequantizedSource, Journal, LayerStream, OutputFolder, TensorInfo, copy_companions
from ..checkpoint.atomic import raw_bytes
from ..checkpoint.convert import ADVICE
from ..checkpoint.formats import CodedMatrix, StoredWeight
from ..checkpoint.formats.requantize import TOGETHER, Counts, Moved, move
from ..errors import CorruptError, UsageError
from ..model import MoELayer
from .load import read_tensors
from .rewrite import Permute, Progress, refuse_nested


class Order(NamedTuple):
    """Where the rows [.., o] and columns [.., i] of a matrix on disk come from."""

    rows: Tensor
    columns: Tensor


class Sums(NamedTuple):
    """What moving a number of weights cost: counts of weights, squared errors and sizes of those that were quantized again."""

    moved: float = 0
    again: float = 0
    error: float = 0
    size: float = 0

    def plus(self, moves: Sequence[Moved]) -> Sums:
        """With one more weight, which was moved so (one entry per expert where it holds several)."""
        changed = [m for m in moves if m.again]
        return Sums(
            self.moved + 1,
            self.again + bool(changed),
            self.error + sum(m.error for m in changed),
            self.size + sum(m.size for m in changed),
        )

    def facts(self) -> dict[str, Any]:
        """As a manifest says it."""
        relative = math.sqrt(self.error / self.size) if self.size else 0.0
        return {"weights": int(self.moved), "requantized": int(self.again), "relative_error": round(relative, 6)}


def quantized(stream: LayerStream) -> DequantizedSource:
    """The source, if its format can be kept. UsageError where it is not quantized."""
    if not isinstance(stream.source, DequantizedSource):
        raise UsageError(f"'{stream.source.folder}' is not quantized, so it has no format to keep", "leave --keep-format out")
    return stream.source


def orders(stream: LayerStream, layer: MoELayer, perm: Tensor) -> dict[str, Order]:
    """What reordering a layer's neurons (perm [E, f]) does to each of its matrices on disk. UsageError if they would be mixed."""
    source, found = quantized(stream), dict[str, list[Tensor]]()
    for axis in (-2, -1):
        with stream.module(layer.name, read=partial(_numbers, source, axis)), torch.no_grad():
            layer.permute(perm)
            numbered = stream.disk_form(stream.state(layer.name))
        for name in stream.disk_names(layer.name):
            if name in source.stored_weights:
                numbers = numbered.get(name)
                if numbers is None:
                    raise UsageError(f"tensor '{name}' does not come back from transformers' conversion under this name", ADVICE)
                found.setdefault(name, []).append(_line(name, numbers, axis))
    swap = {name: source.stored_weights[name].transposed for name in found}
    return {name: Order(*(reversed(pair) if swap[name] else pair)) for name, pair in found.items()}


def column_counts(stream: LayerStream, layer: MoELayer, counts: Counts) -> dict[str, Counts]:
    """`counts` of neurons [E, f] (and of neighbours [E, ceil(f / 32), 32, 32]) as those of the columns [.., i] that read them on disk."""
    source, found = quantized(stream), dict[str, Counts]()
    numbers = torch.arange(1.0, layer.num_experts * layer.width + 1).reshape(layer.num_experts, 1, layer.width)
    with stream.module(layer.name, read=lambda name: torch.zeros(source.info(name).shape)), torch.no_grad():
        layer.down.copy_(numbers.expand(layer.down.shape))
        spread = stream.disk_form(stream.state(layer.name))
    for name in stream.disk_names(layer.name):
        weight = source.stored_weights.get(name)
        if weight and spread[name].any():
            neurons = (spread[name][..., 0] if weight.transposed else spread[name][..., 0, :]).long() - 1
            together = None if counts.together is None else _neighbours(counts.together, neurons, layer.width)
            found[name] = Counts(counts.alone.flatten()[neurons], together)
    return found


def _neighbours(together: Tensor, neurons: Tensor, width: int) -> Tensor | None:
    """Of the blocks of all experts, those of columns that read these neurons; None where they do not lie side by side."""
    first, inside = neurons[..., ::TOGETHER], torch.arange(neurons.shape[-1]) % TOGETHER
    if bool((first % width % TOGETHER).any()) or not torch.equal(
        first.repeat_interleave(TOGETHER, -1)[..., : len(inside)] + inside, neurons
    ):
        return None
    return together.flatten(0, 1)[first // width * together.shape[1] + first % width // TOGETHER]


def neuron_group(stream: LayerStream, layer: MoELayer) -> int:
    """How many neighbouring neurons of a layer share codes or scales on disk: what has to stay together for codes to stay."""
    source, unit, seen = quantized(stream), 1, set[str]()
    rolled = torch.arange(layer.width).roll(1).expand(layer.num_experts, -1)
    for name, order in orders(stream, layer, rolled).items():
        kind = re.sub(r"\d+", "#", name)
        if kind in seen:
            continue
        seen.add(kind)
        matrix = _matrix(source, source.stored_weights[name])
        for size, line in zip(matrix.group, order, strict=True):
            first = line.reshape(-1, line.shape[-1])[0]
            if size < len(first) and not torch.equal(first, torch.arange(len(first))):
                unit = math.lcm(unit, size)
    return unit


def stored_bytes(stream: LayerStream, layer: MoELayer) -> float:
    """Bytes per weight of a layer's experts on disk, scales included."""
    source, stored, weights = quantized(stream), 0, 0
    for name in stream.disk_names(layer.name):
        parts = source.stored_weights[name].parts.values() if name in source.stored_weights else [name]
        stored += sum(source.raw.info(part).bytes for part in parts)
        weights += math.prod(source.info(name).shape)
    return round(stored / weights, 6)


class QuantizedWriter:
    """Writes one output shard at a time in the format of the source.

    counts: of a layer's neurons [E, f], in its new order: what errors in their output weights count. None where no code may change,
    which is a UsageError then.
    """

    def __init__(
        self, stream: LayerStream, perms: Permute, layers: Sequence[MoELayer], counts: Callable[[MoELayer], Counts] | None
    ) -> None:
        self.stream, self.source, self._perms, self._counts = stream, quantized(stream), perms, counts
        self._layers = {layer.name: layer for layer in layers}
        self._owned = {layer.name: stream.disk_names(layer.name) for layer in layers}

    def write(self, shard: str, file: BinaryIO) -> Sums:
        """One shard of the source, whose header stays. Returns what its weights cost (each counts where its codes lie)."""
        raw = self.source.raw
        inside = {info.name: info for info in raw.header(shard).tensors if raw.is_read(info)}
        file.write(raw.header_bytes(shard))
        for info in raw.header(shard).tensors:
            file.seek(info.begin)
            for block in raw.blocks(info):
                file.write(block)
        sums = Sums()
        for layer, names in self._owned.items():
            if any(part in inside for name in names for part in self._parts(name)):
                sums = self._layer(self._layers[layer], inside, file, sums)
        return sums

    def _layer(self, layer: MoELayer, inside: Mapping[str, TensorInfo], file: BinaryIO, sums: Sums) -> Sums:
        perm = self._perms(layer)
        counts = column_counts(self.stream, layer, self._counts(layer)) if self._counts else {}
        for name, order in orders(self.stream, layer, perm).items():
            weight = self.source.stored_weights[name]
            if not any(part in inside for part in weight.parts.values()):
                continue
            tensors, moves = self._moved(name, weight, order, counts.get(name))
            if weight.parts["codes"] in inside:
                sums = sums.plus(moves)
            for role, tensor in tensors.items():
                info = inside.get(weight.parts[role])
                if info is not None:
                    _replace(tensor, info, file)
        plain = [n for n in self._owned[layer.name] if n not in self.source.stored_weights and n in inside]
        if plain:
            with self.stream.module(layer.name, disk_dtype=True), torch.no_grad():
                layer.permute(perm)
                tensors = self.stream.disk_tensors(layer.name)
            for name in plain:
                _replace(tensors[name], inside[name], file)
        return sums

    def _moved(
        self, name: str, weight: StoredWeight, order: Order, counts: Counts | None
    ) -> tuple[dict[str, Tensor], list[Moved]]:
        parts = {role: self.source.raw.tensor(part) for role, part in weight.parts.items()}
        matrix = self.source.form.matrix(parts)
        if matrix.codes.ndim == 2:
            moves = [move(matrix, order.rows, order.columns, counts)]
        else:
            each = [None if counts is None else _of(counts, i) for i in range(len(matrix.codes))]
            moves = [move(m, rows, columns, c) for m, rows, columns, c in zip(matrix.each(), *order, each, strict=True)]
        if self._counts is None and any(m.again for m in moves):
            raise UsageError(f"the partition cuts groups of '{name}'", "leave --keep-codes out, or build the partition again")
        return self.source.form.tensors(_joined(moves, matrix), parts), moves

    def _parts(self, name: str) -> Sequence[str]:
        weight = self.source.stored_weights.get(name)
        return [*weight.parts.values()] if weight else [name]


def rewrite_quantized(
    writer: QuantizedWriter, out: OutputFolder, journal: Journal, progress: Progress | None = None
) -> dict[str, Any]:
    """As `rewrite_shards`, in the source's own format; returns what it cost, for the manifest.

    A finished shard is a unit of `journal`, and so is what its weights cost, a file that stays until `discard_sums`.
    """
    raw = writer.source.raw
    refuse_nested(raw.folder, out)
    pending = [shard for shard in raw.shards() if not (journal.done(shard) and journal.done(_sums_of(shard)))]
    out.hashes.update({shard: journal.sha256(shard) for shard in raw.shards() if shard not in pending})
    out.require_space(sum(raw.header(shard).size for shard in pending))
    copy_companions(raw.folder, out, raw)
    if raw.index_file:
        out.write_bytes(raw.index_file, raw.index_bytes())
    done = raw.bytes - sum(raw.header(shard).size for shard in pending)
    for shard in pending:
        with out.stage(shard) as file:
            sums = writer.write(shard, file)
        journal.finish(_sums_of(shard), out.save_tensors(_sums_of(shard), {"sums": torch.tensor(sums, dtype=torch.float64)}))
        journal.finish(shard, out.hashes[shard])
        done += raw.header(shard).size
        if progress:
            progress(done, raw.bytes)
    rows = torch.stack([_read_sums(out.work / _sums_of(shard)) for shard in raw.shards()])
    return Sums(*rows.sum(0).tolist()).facts()


def _read_sums(path: Path) -> Tensor:
    sums = read_tensors(path).get("sums")
    if sums is None or sums.dtype != torch.float64 or sums.shape != (len(Sums._fields),):
        raise CorruptError(f"{path} holds no sums of what moved", "use --force to start again")
    return sums


def discard_sums(out: OutputFolder) -> None:
    """Take what shards cost out of the work folder."""
    for path in sorted(out.work.glob(_sums_of("*"))):
        out.discard(path.name)


def _sums_of(shard: str) -> str:
    return f"moved-{shard}"


def _of(counts: Counts, expert: int) -> Counts:
    return Counts(counts.alone[expert], None if counts.together is None else counts.together[expert])


def _joined(moves: Sequence[Moved], like: CodedMatrix) -> CodedMatrix:
    """One matrix, or one per entry of the first dimension, as `like` has it."""
    if like.codes.ndim == 2:
        return moves[0].matrix
    zeros = None if like.zeros is None else torch.stack([m.matrix.zeros for m in moves if m.matrix.zeros is not None])
    codes, scales = (torch.stack([getattr(m.matrix, field) for m in moves]) for field in ("codes", "scales"))
    return replace(like, codes=codes, scales=scales, zeros=zeros)


def _matrix(source: DequantizedSource, weight: StoredWeight) -> CodedMatrix:
    return source.form.matrix({role: source.raw.tensor(part) for role, part in weight.parts.items()})


def _numbers(source: DequantizedSource, axis: int, name: str) -> Tensor:
    """A tensor of the shape of this one that holds the index along an axis; zeros where it has no such axis."""
    shape = source.info(name).shape
    if len(shape) < -axis:
        return torch.zeros(shape)
    line = torch.arange(shape[axis], dtype=torch.float32)
    return (line[:, None] if axis == -2 else line).expand(shape).contiguous()


def _line(name: str, numbers: Tensor, axis: int) -> Tensor:
    """The order along an axis, from numbers that are equal along the other one."""
    line = numbers[..., :, :1] if axis == -2 else numbers[..., :1, :]
    order = line.flatten(-2).long()
    whole = torch.equal(numbers, line.expand_as(numbers))
    if not whole or not torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order)):
        raise UsageError(
            f"reordering neurons would mix '{name}' with another tensor", "use --dtype bf16 instead of --keep-format"
        )
    return order


def _replace(tensor: Tensor, info: TensorInfo, file: BinaryIO) -> None:
    data = raw_bytes(tensor)
    if len(data) != info.bytes:
        raise UsageError(f"tensor '{info.name}' comes back in another size than it has on disk", ADVICE)
    file.seek(info.begin)
    file.write(data)

"""Removal in the source's quantized format: codes and scales of an expert are tensors of their own, or rows of some, and move as bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...checkpoint import DequantizedSource, Journal, LayerStream, OutputFolder, TensorInfo
from ...checkpoint.constant import expert_name
from ...checkpoint.dequantized import quantization
from ...checkpoint.mtp import block_tails, moved
from ...errors import UsageError
from ...model import MoELayer
from ...model.router import Router
from .choice import KeptExperts
from .remove import BlockWriter, Removal, check_removable, config_of
from .write import Planned, write_checkpoint

ADVICE = "leave --keep-format out: the experts are then written dequantized"


def remove_quantized(
    stream: LayerStream,
    layers: Sequence[MoELayer],
    choices: Sequence[KeptExperts],
    out: OutputFolder,
    journal: Journal,
    how: Removal | None = None,
) -> None:
    """`remove_experts` in the source's own format. UsageError where experts share codes or scales, or config.json names single ones."""
    experts, how, source = check_removable(choices), how or Removal(), stream.source
    assert isinstance(source, DequantizedSource)
    if how.mtp == "prune":
        raise UsageError("--keep-format does not reach into layers for multi-token prediction", "use --mtp keep or drop")
    if re.search(r"experts\.\d", str(quantization(source.folder))):
        raise UsageError("quantization_config of config.json names single experts, which would get other ids", ADVICE)
    writer = _BytesWriter(stream, source, [Router(stream.model, layer) for layer in layers], choices, how)
    config = config_of(stream, source.raw.config(), choices[0], experts, how.mtp == "drop")
    write_checkpoint(source.raw, config, writer, out, journal, how.progress)


class _BytesWriter(BlockWriter):
    """made: tensor of the output -> the one of the source that it holds; rows: tensors with a row per expert -> their layer."""

    def __init__(
        self,
        stream: LayerStream,
        source: DequantizedSource,
        routers: Sequence[Router],
        choices: Sequence[KeptExperts],
        how: Removal,
    ) -> None:
        super().__init__(stream, routers, choices, how)
        self.quantized = source
        self.made: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.gone = {part for name in self._left for part in self._parts(name)}
        for i, choice in enumerate(choices):
            if not choice.is_full:
                self._map(i, choice)
        self._map_beside()

    def _parts(self, name: str) -> list[str]:
        weight = self.quantized.stored_weights.get(name)
        return [name] if weight is None else list(weight.parts.values())

    def _map(self, i: int, choice: KeptExperts) -> None:
        block = [name for name, owner in self._owner.items() if owner == i]
        _, tails = block_tails(block)
        kept = dict(moved(tails, choice.kept))
        for tail, name in tails.items():
            stored = self.quantized.stored_weights
            if tail not in kept:
                self.gone |= set(self._parts(name))
            elif kept[tail] != tail or _is_one_of_many(tail, tails):
                self.made |= dict(zip(self._parts(name), self._parts(tails[kept[tail]]), strict=True))
            elif name in stored:
                for part in stored[name].parts.values():
                    shape = self.quantized.raw.info(part).shape
                    if not shape or shape[0] != choice.experts:
                        raise UsageError(f"tensor '{part}' has no row of its own for every expert", ADVICE)
                    self.rows[part] = i

    def _map_beside(self) -> None:
        """What says how activations are quantized has no place in the plain model: it follows its expert by name."""
        experts = {part[0]: i for name, i in self._owner.items() if (part := expert_name(name))}
        dropped = {name.rpartition(".")[0] for name in self._left}
        for name in self.quantized.left_out:
            part = expert_name(name)
            if name.rpartition(".")[0] in dropped:
                self.gone.add(name)
            elif part and part[0] in experts:
                kept = self.choices[experts[part[0]]].kept
                if part[1] < len(kept):
                    self.made[name] = f"{part[0]}.{kept[part[1]]}.{part[2]}"
                else:
                    self.gone.add(name)

    def plan(self, shard: str) -> list[Planned]:
        found, raw = [], self.quantized.raw
        for info in raw.header(shard).tensors:
            if not raw.is_read(info) or info.name in self.gone:
                continue
            if info.name in self.made:
                self._check_alike(info, raw.info(self.made[info.name]))
                found.append(Planned(info, info.shape, None))
            elif info.name in self.rows:
                found.append(Planned(info, (len(self.choices[self.rows[info.name]].kept), *info.shape[1:]), None))
            else:
                owner = self._owner.get(info.name) if info.name in self._shapes else None
                found.append(Planned(info, info.shape if owner is None else self._shapes[info.name], owner))
        return found

    @staticmethod
    def _check_alike(info: TensorInfo, other: TensorInfo) -> None:
        if (info.shape, info.dtype) != (other.shape, other.dtype):
            raise UsageError(f"tensor '{info.name}' and '{other.name}' are not stored alike", ADVICE)

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        raw = self.quantized.raw
        for t in tensors:
            name = t.info.name
            if t.owner is not None:
                continue
            data = raw.stored(raw.info(self.made[name])) if name in self.made else raw.stored(t.info)
            if name in self.rows:
                data = data.view(torch.uint8)[list(self.choices[self.rows[name]].kept)].view(data.dtype)
            yield t, data
        for i in sorted({t.owner for t in tensors if t.owner is not None}):
            sliced = self._load(i)
            yield from ((t, sliced[t.info.name]) for t in tensors if t.owner == i)


def _is_one_of_many(tail: str, tails: dict[str, str]) -> bool:
    """Whether other tensors of the block have the same name but for its numbers: one per expert, then."""
    form = re.sub(r"\d+", "#", tail)
    return sum(re.sub(r"\d+", "#", other) == form for other in tails) > 1

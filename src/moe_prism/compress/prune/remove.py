"""Physical removal: the checkpoint again, without the experts that go. What is written is an ordinary checkpoint of the same family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite, copy_companions
from ...checkpoint.atomic import raw_bytes
from ...checkpoint.convert import ADVICE
from ...checkpoint.header import NAMES
from ...checkpoint.shards import INDEX
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ...model.router import COUNT_NAMES, GROUP_LIMIT_NAMES, GROUP_NAMES, Router
from .choose import KeptExperts

Progress = Callable[[int, int], None]
"""(bytes written, bytes in total)."""


def check_removable(choices: Sequence[KeptExperts]) -> int:
    """The number of experts every layer keeps. UsageError where transformers could not hold the result."""
    counts = sorted({len(choice.kept) for choice in choices})
    if len(counts) > 1:
        raise UsageError(
            f"layers keep {counts[0]} to {counts[-1]} experts, and a transformers checkpoint has one number for all",
            "use --allocation layer, or --report-only and mask mode",
        )
    if any(choice.masked for choice in choices):
        raise UsageError("--groups mask leaves groups of unequal size, which only mask mode can run", "use --groups per_group")
    return counts[0]


def remove_experts(
    stream: LayerStream,
    layers: Sequence[MoELayer],
    choices: Sequence[KeptExperts],
    out: OutputFolder,
    journal: Journal,
    progress: Progress | None = None,
) -> None:
    """Copy stream's checkpoint to `out.work` with the kept experts of every layer, renumbered in the order of `choice.kept`.

    Experts and router rows are sliced, config.json gets the new numbers, every other tensor is copied as it is. Shard by shard; a
    finished shard is a unit of `journal`, a shard that would be empty is left out. Peak memory: one MoE block. UsageError for a family
    whose files or configuration cannot express it: the first layer is read back through transformers before anything is visible.
    """
    experts = check_removable(choices)
    source = stream.source
    writer = _Writer(stream, [Router(stream.model, layer) for layer in layers], choices)
    copy_companions(source.folder, out)
    out.write_bytes("config.json", _config(stream, choices[0], experts))
    plan = {shard: writer.plan(shard) for shard in source.shards()}
    plan = {shard: tensors for shard, tensors in plan.items() if tensors}
    sizes = {shard: sum(t.bytes for t in tensors) for shard, tensors in plan.items()}
    pending = [shard for shard in plan if not journal.done(shard)]
    out.hashes.update({shard: journal.sha256(shard) for shard in plan if shard not in pending})
    out.require_space(sum(sizes[shard] for shard in pending))
    for shard in pending:
        with out.stage(shard) as file:
            writer.write(shard, plan[shard], file)
        journal.finish(shard, shard, out.hashes[shard])
        if progress:
            progress(sum(sizes[s] for s in plan if journal.done(s)), sum(sizes.values()))
    if (source.folder / INDEX).is_file():
        out.write_bytes(INDEX, _index(source.folder / INDEX, plan))
    writer.read_back(out.work)


class _Tensor:
    """A tensor of the output: its entry in a header, and whether it is sliced."""

    def __init__(self, info: TensorInfo, shape: Sequence[int], owner: int | None) -> None:
        self.info, self.shape, self.owner = info, list(shape), owner
        self.bytes = info.bytes * _volume(shape) // max(1, _volume(info.shape))


class _Writer:
    """Writes one output shard at a time, and holds the sliced tensors of one block at a time."""

    def __init__(self, stream: LayerStream, routers: Sequence[Router], choices: Sequence[KeptExperts]) -> None:
        self.stream, self.routers, self.choices = stream, routers, choices
        self._targets = [self._parameters(router) for router in routers]
        self._owner = {name: i for i, targets in enumerate(self._targets) for name in stream.feeds(targets)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for i, choice in enumerate(choices):
            if not choice.is_full:
                self._shapes |= {name: tuple(t.shape) for name, t in self._checked(i, self._sliced(i)).items()}
        self._tried = False

    def plan(self, shard: str) -> list[_Tensor]:
        """The tensors an output shard holds, in the order of the source's."""
        found = []
        for info in self.stream.source.header(shard).tensors:
            i = self._owner.get(info.name)
            if i is None or self.choices[i].is_full:
                found.append(_Tensor(info, info.shape, None))
            elif info.name in self._shapes:
                found.append(_Tensor(info, self._shapes[info.name], i))
        return found

    def write(self, shard: str, tensors: Sequence[_Tensor], file: BinaryIO) -> None:
        position, header, begins = 0, dict[str, Any](), dict[str, int]()
        metadata = self.stream.source.header(shard).metadata
        for t in tensors:
            header[t.info.name] = {"dtype": t.info.dtype, "shape": t.shape, "data_offsets": [position, position + t.bytes]}
            begins[t.info.name] = position
            position += t.bytes
        text = json.dumps(({"__metadata__": metadata} if metadata else {}) | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        for t in tensors:
            if t.owner is None:
                data = self.stream.source.stored(t.info.name)
                check_finite(t.info.name, data, shard)
                file.seek(start + begins[t.info.name])
                file.write(raw_bytes(data))
        for i in sorted({t.owner for t in tensors if t.owner is not None}):
            sliced = self._load(i)
            for t in tensors:
                if t.owner == i:
                    file.seek(start + begins[t.info.name])
                    file.write(raw_bytes(sliced[t.info.name]))

    def read_back(self, folder: Path) -> None:
        """Load the first sliced layer of what was written as transformers would; UsageError if it is not what was sliced."""
        i = next((i for i, choice in enumerate(self.choices) if not choice.is_full), None)
        if i is None:
            return
        written = LayerStream(folder)
        layer = find_layers(written.model)[i]
        router = Router(written.model, layer)
        with self.stream.module(self.routers[i].name, disk_dtype=True):
            wanted = {name: tensor.clone() for name, tensor in self._sliced(i).items()}
        with written.module(router.name, disk_dtype=True):
            router.check()
            found = {name: dict(written.model.state_dict(keep_vars=True))[name] for name in wanted}
        for name, tensor in wanted.items():
            if found[name].shape != tensor.shape or not torch.equal(found[name], tensor):
                raise UsageError(f"'{name}' of the pruned checkpoint does not come back through transformers", ADVICE)

    def _parameters(self, router: Router) -> dict[str, int]:
        """Full names of the tensors with an entry per expert, and where that entry is."""
        experts = router.layer.module
        found = {f"{router.layer.name}.{name}": 0 for name, _ in experts.named_parameters()}
        for name, parameter in experts.named_parameters():
            if parameter.shape[0] != router.experts:
                raise UsageError(f"'{router.layer.name}.{name}' is not stored expert by expert", "use mask mode")
        return found | {f"{router.name}.{row.path}": row.dim for row in router.rows}

    def _sliced(self, i: int) -> dict[str, Tensor]:
        """Parameters of block i without the experts that go, on whatever device they are."""
        state = self.stream.model.state_dict(keep_vars=True)
        kept = torch.tensor(self.choices[i].kept)
        return {
            name: state[name].detach().index_select(dim, kept.to(state[name].device)) for name, dim in self._targets[i].items()
        }

    def _checked(self, i: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same under the names on disk, all of which the source has."""
        found = self.stream.disk_form(state)
        strange = sorted(name for name in found if self._owner.get(name) != i)
        if strange:
            raise UsageError(f"tensor '{strange[0]}' does not come back from transformers' conversion under this name", ADVICE)
        return found

    def _load(self, i: int) -> Mapping[str, Tensor]:
        router, source = self.routers[i], self.stream.source
        with self.stream.module(router.name, disk_dtype=True):
            router.check()
            for name, parameter in self._sliced(i).items():
                check_finite(name, parameter, source.folder.name)
            if not self._tried:
                self._try(router)
            found = self._checked(i, self._sliced(i))
        for name, tensor in found.items():
            if NAMES[tensor.dtype] != source.info(name).dtype:
                raise UsageError(f"tensor '{name}' comes back with another dtype than it has on disk", ADVICE)
        return found

    def _try(self, router: Router) -> None:
        """Once per run: an untouched block must come back with the bytes it has on disk, else the family is not safe."""
        for name, tensor in self.stream.disk_tensors(router.name).items():
            if raw_bytes(tensor) != raw_bytes(self.stream.source.stored(name)):
                raise UsageError(f"tensor '{name}' changes when transformers loads and saves it", ADVICE)
        self._tried = True


def _volume(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _config(stream: LayerStream, choice: KeptExperts, experts: int) -> bytes:
    """config.json with the new number of experts, and of groups where those changed. UsageError if it names no such number."""
    config = stream.model.config.get_text_config(decoder=True)
    raw = stream.source.config()
    raw.pop("auto_map", None)
    section = next((raw[key] for key in ("text_config",) if isinstance(raw.get(key), dict)), raw)
    changes: list[tuple[tuple[str, ...], int, int]] = [(COUNT_NAMES, choice.experts, experts)]
    if choice.groups:
        before = next(n for n in (getattr(config, name, None) for name in GROUP_NAMES) if isinstance(n, int))
        changes += [(GROUP_NAMES, before, choice.groups.count), (GROUP_LIMIT_NAMES, choice.groups.limit, choice.groups.limit)]
    for names, old, new in changes:
        keys = {config.attribute_map.get(name, name) for name in names if getattr(config, name, None) == old}
        keys |= {name for name in names if section.get(name) == old}
        if not keys:
            raise UsageError(f"config.json of '{config.model_type}' has no single number of experts", "use mask mode")
        section.update(dict.fromkeys(sorted(keys), new))
    return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"


def _index(path: Path, plan: Mapping[str, Sequence[_Tensor]]) -> bytes:
    metadata = json.loads(path.read_bytes()).get("metadata") or {}
    metadata |= {"total_size": sum(t.bytes for tensors in plan.values() for t in tensors)}
    weight_map = {t.info.name: shard for shard, tensors in plan.items() for t in tensors}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2).encode() + b"\n"

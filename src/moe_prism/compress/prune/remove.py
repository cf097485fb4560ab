"""Physical removal: the checkpoint again, without the experts that go. What is written is an ordinary checkpoint of the same family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ...checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite, copy_companions
from ...checkpoint.atomic import raw_bytes
from ...checkpoint.convert import ADVICE
from ...checkpoint.header import NAMES
from ...checkpoint.mtp import CHOICE, MTPEdit, mtp_layers
from ...checkpoint.mtp import CONFIG_KEYS as MTP_KEYS
from ...checkpoint.shards import INDEX
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ...model.router import COUNT_NAMES, GROUP_LIMIT_NAMES, GROUP_NAMES, Router
from ...options.prune import MTPMode
from ...schema import read_json
from ...schema.config import INDEX_BOUNDS
from ...schema.read import RESTORE
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


class Removal(NamedTuple):
    """mtp: what happens to layers for multi-token prediction with experts; progress: hears of bytes written and in total."""

    mtp: MTPMode | None = None
    progress: Progress | None = None


def check_mtp_choice(stream: LayerStream, layers: Sequence[MoELayer], mtp: MTPMode | None) -> None:
    """UsageError where the files hold an MTP layer with experts and nobody said what becomes of it."""
    found = mtp_layers(stream, block_tensors(stream, layers[-1])) if mtp is None else []
    if found:
        raise UsageError(f"'{found[0].root.rstrip('.')}' is a layer for multi-token prediction with experts of its own", CHOICE)


def remove_experts(
    stream: LayerStream,
    layers: Sequence[MoELayer],
    choices: Sequence[KeptExperts],
    out: OutputFolder,
    journal: Journal,
    how: Removal | None = None,
) -> None:
    """Copy stream's checkpoint to `out.work` with the kept experts of every layer, renumbered in the order of `choice.kept`.

    Experts and router rows are sliced, config.json gets the new numbers, every other tensor is copied as it is. Shard by shard; a
    finished shard is a unit of `journal`, a shard that would be empty is left out. Peak memory: one MoE block. UsageError for a family
    whose files or configuration cannot express it: the first layer is read back through transformers before anything is visible.
    """
    experts, how = check_removable(choices), how or Removal()
    source = stream.source
    writer = _Writer(stream, [Router(stream.model, layer) for layer in layers], choices, how.mtp)
    copy_companions(source.folder, out, source)
    out.write_bytes("config.json", _config(stream, choices[0], experts, how.mtp == "drop"))
    plan = {shard: writer.plan(shard) for shard in source.shards()}
    plan = {shard: tensors for shard, tensors in plan.items() if tensors}
    sizes = {shard: sum(t.bytes for t in tensors) for shard, tensors in plan.items()}
    pending = [shard for shard in plan if not journal.done(shard)]
    out.hashes.update({shard: journal.sha256(shard) for shard in plan if shard not in pending})
    out.require_space(sum(sizes[shard] for shard in pending))
    for shard in pending:
        with out.stage(shard) as file:
            writer.write(shard, plan[shard], file)
        journal.finish(shard, out.hashes[shard])
        if how.progress:
            how.progress(sum(sizes[s] for s in plan if journal.done(s)), sum(sizes.values()))
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

    def __init__(
        self, stream: LayerStream, routers: Sequence[Router], choices: Sequence[KeptExperts], mtp: MTPMode | None
    ) -> None:
        self.stream, self.routers, self.choices = stream, routers, choices
        for router in routers:
            for name, parameter in router.layer.module.named_parameters():
                if parameter.shape[0] % router.experts:
                    raise UsageError(f"'{router.layer.name}.{name}' is not stored expert by expert", "use mask mode")
        self._targets = [_parameters(router) for router in routers]
        self._owner = {name: i for i, targets in enumerate(self._targets) for name in stream.feeds(targets)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for i, choice in enumerate(choices):
            if not choice.is_full:
                self._shapes |= {name: tuple(t.shape) for name, t in self._checked(i, self._sliced(i)).items()}
        self._tried = False
        block, last = block_tensors(stream, routers[-1].layer), choices[-1]
        self._left = {name for layer in mtp_layers(stream, block) for name in layer.tensors} if mtp == "drop" else set()
        self._mtp = MTPEdit(stream, block, self._shapes, last.kept) if mtp == "prune" and not last.is_full else None

    def plan(self, shard: str) -> list[_Tensor]:
        """The tensors an output shard holds, in the order of the source's."""
        found = []
        for info in self.stream.source.header(shard).tensors:
            i = self._owner.get(info.name)
            if not self.stream.source.is_read(info) or info.name in self._left:
                continue
            if self._mtp and info.name in self._mtp.names:
                shape = self._mtp.shape(info.name)
                found += [] if shape is None else [_Tensor(info, shape, None)]
            elif i is None or self.choices[i].is_full:
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
                edited = self._mtp and t.info.name in self._mtp.names
                data = self._mtp.tensor(t.info.name) if self._mtp and edited else self.stream.source.stored(t.info)
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

    def _sliced(self, i: int) -> dict[str, Tensor]:
        """Parameters of block i without the experts that go, on whatever device they are."""
        state = self.stream.model.state_dict(keep_vars=True)
        experts, kept = self.choices[i].experts, torch.tensor(self.choices[i].kept)
        found = {}
        for name, dim in self._targets[i].items():
            tensor = state[name].detach()
            rows = tensor.shape[dim] // experts  # one, but where experts lie below each other in a matrix (DBRX)
            ids = (kept[:, None] * rows + torch.arange(rows)).flatten()
            found[name] = tensor.index_select(dim, ids.to(tensor.device))
        return found

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
            if raw_bytes(tensor) != raw_bytes(self.stream.source.stored(self.stream.source.info(name))):
                raise UsageError(f"tensor '{name}' changes when transformers loads and saves it", ADVICE)
        self._tried = True


def _parameters(router: Router) -> dict[str, int]:
    """Full names of the tensors with an entry per expert, and where that entry is."""
    experts = router.layer.module
    found = {f"{router.layer.name}.{name}": 0 for name, _ in experts.named_parameters()}
    return found | {f"{router.name}.{row.path}": row.dim for row in router.rows}


def block_tensors(stream: LayerStream, layer: MoELayer) -> list[str]:
    """Names on disk of a layer's experts and of its router's rows."""
    return stream.feeds(_parameters(Router(stream.model, layer)))


def _volume(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _config(stream: LayerStream, choice: KeptExperts, experts: int, drop_mtp: bool) -> bytes:
    """config.json with the new number of experts, of groups where those changed, and without MTP layers where those are dropped.

    UsageError if it names no such number.
    """
    config = stream.model.config.get_text_config(decoder=True)
    raw = stream.source.config()
    raw.pop("auto_map", None)
    section = _section(stream.model.config, config, raw)
    changes: list[tuple[tuple[str, ...], int, int]] = [(COUNT_NAMES, choice.experts, experts)]
    if choice.groups:
        before = next(n for n in (getattr(config, name, None) for name in GROUP_NAMES) if isinstance(n, int))
        changes += [(GROUP_NAMES, before, choice.groups.count), (GROUP_LIMIT_NAMES, choice.groups.limit, choice.groups.limit)]
    for names, old, new in changes:
        keys = {config.attribute_map.get(name, name) for name in names if getattr(config, name, None) == old}
        keys |= {name for name in names if section.get(name) == old}
        if not keys:  # DBRX keeps it in a part of its own
            section = next(
                (part for part in section.values() if isinstance(part, dict) and any(part.get(n) == old for n in names)), {}
            )
            keys = {name for name in names if section.get(name) == old}
        if not keys:
            raise UsageError(f"config.json of '{config.model_type}' has no single number of experts", "use mask mode")
        section.update(dict.fromkeys(sorted(keys), new))
    if drop_mtp:
        for part in (raw, section):
            part.update({key: 0 for key in MTP_KEYS if key in part})
    return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"


def _section(config: Any, text: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the text model: the whole of it, or a part of a part (Qwen3-Omni)."""
    if config is text:
        return raw
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    key = next((key for key, part in inner.items() if part is text or _holds(part, text)), None)
    return _section(inner[key], text, raw[key]) if key in raw else raw


def _holds(config: Any, text: Any) -> bool:
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
    return any(part is text or _holds(part, text) for part in parts)


def _index(path: Path, plan: Mapping[str, Sequence[_Tensor]]) -> bytes:
    found = read_json(path, RESTORE, INDEX_BOUNDS).get("metadata")
    metadata = found if isinstance(found, dict) else {}
    metadata |= {"total_size": sum(t.bytes for tensors in plan.values() for t in tensors)}
    weight_map = {t.info.name: shard for shard, tensors in plan.items() for t in tensors}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2).encode() + b"\n"

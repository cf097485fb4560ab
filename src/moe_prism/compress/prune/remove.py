"""Physical removal: the checkpoint again, without the experts that go. What is written is an ordinary checkpoint of the same family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint import Journal, LayerStream, OutputFolder, TensorInfo, check_finite
from ...checkpoint.atomic import raw_bytes
from ...checkpoint.convert import ADVICE
from ...checkpoint.dtypes import NAMES
from ...checkpoint.mtp import CHOICE, MTPEdit, mtp_layers
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ...model.router import COUNT_NAMES, GROUP_LIMIT_NAMES, GROUP_NAMES, Router
from ...options.prune import MTPMode
from .choice import KeptExperts
from .write import Planned, Progress, ShardWriter, by_owner, config_text, text_section, write_checkpoint


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


Rewrite = Callable[[int, MoELayer], None]
"""(number of a layer, the layer in memory): its weights become others."""


class Removal(NamedTuple):
    """mtp: what happens to layers for multi-token prediction with experts; progress: hears of bytes written and in total.

    rewrite: what is done to the weights of every layer before experts go.
    """

    mtp: MTPMode | None = None
    progress: Progress | None = None
    rewrite: Rewrite | None = None


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
    writer = BlockWriter(stream, [Router(stream.model, layer) for layer in layers], choices, how)
    config = config_of(stream, stream.source.config(), choices[0], experts, how.mtp == "drop")
    write_checkpoint(stream.source, config, writer, out, journal, how.progress)


class BlockWriter(ShardWriter):
    """Holds the sliced tensors of one block at a time."""

    def __init__(self, stream: LayerStream, routers: Sequence[Router], choices: Sequence[KeptExperts], how: Removal) -> None:
        self.stream, self.routers, self.choices, self.rewrite = stream, routers, choices, how.rewrite
        mtp = how.mtp
        for router in routers:
            for name, parameter in router.layer.module.named_parameters():
                if parameter.shape[0] % router.experts:
                    raise UsageError(f"'{router.layer.name}.{name}' is not stored expert by expert", "use mask mode")
        self._targets = [row_tensors(router) for router in routers]
        self._owner = {name: i for i, targets in enumerate(self._targets) for name in stream.feeds(targets)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for i, choice in enumerate(choices):
            if self._changes(choice):
                self._shapes |= {name: tuple(t.shape) for name, t in self._checked(i, self._sliced(i)).items()}
        self._tried = False
        block, last = block_tensors(stream, routers[-1].layer), choices[-1]
        self._left = {name for layer in mtp_layers(stream, block) for name in layer.tensors} if mtp == "drop" else set()
        self._mtp = MTPEdit(stream, block, self._shapes, last.kept) if mtp == "prune" and not last.is_full else None

    def plan(self, shard: str) -> list[Planned]:
        found = []
        for info in self.stream.source.header(shard).tensors:
            i = self._owner.get(info.name)
            if not self.stream.source.is_read(info) or info.name in self._left:
                continue
            if self._mtp and info.name in self._mtp.names:
                shape = self._mtp.shape(info.name)
                found += [] if shape is None else [Planned(info, shape, None)]
            elif i is None or not self._changes(self.choices[i]):
                found.append(Planned(info, info.shape, None))
            elif info.name in self._shapes:
                found.append(Planned(info, self._shapes[info.name], i))
        return found

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        return by_owner(shard, tensors, self._kept, self._load)

    def _kept(self, info: TensorInfo) -> Tensor:
        edited = self._mtp and info.name in self._mtp.names
        return self._mtp.tensor(info.name) if self._mtp and edited else self.stream.source.stored(info)

    def read_back(self, folder: Path) -> None:
        """Load the first sliced layer of what was written as transformers would; UsageError if it is not what was sliced."""
        i = next((i for i, choice in enumerate(self.choices) if self._changes(choice)), None)
        if i is None:
            return
        written = LayerStream(folder)
        layer = find_layers(written.model)[i]
        router = Router(written.model, layer)
        with self.stream.module(self.routers[i].name, disk_dtype=True):
            self._rewrite(i)
            wanted = {name: tensor.clone() for name, tensor in self._sliced(i).items()}
        with written.module(router.name, disk_dtype=True):
            router.check()
            found = {name: dict(written.model.state_dict(keep_vars=True))[name] for name in wanted}
        for name, tensor in wanted.items():
            if found[name].shape != tensor.shape or not torch.equal(found[name], tensor):
                raise UsageError(f"'{name}' of the pruned checkpoint does not come back through transformers", ADVICE)

    def _changes(self, choice: KeptExperts) -> bool:
        return self.rewrite is not None or not choice.is_full

    def _rewrite(self, i: int) -> None:
        if self.rewrite is not None:
            self.rewrite(i, self.routers[i].layer)

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
            self._rewrite(i)
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


def row_tensors(router: Router) -> dict[str, int]:
    """Full names of the tensors with an entry per expert, and where that entry is."""
    experts = router.layer.module
    found = {f"{router.layer.name}.{name}": 0 for name, _ in experts.named_parameters()}
    return found | {f"{router.name}.{row.path}": row.dim for row in router.rows}


def block_tensors(stream: LayerStream, layer: MoELayer) -> list[str]:
    """Names on disk of a layer's experts and of its router's rows."""
    return stream.feeds(row_tensors(Router(stream.model, layer)))


def config_of(stream: LayerStream, raw: dict[str, Any], choice: KeptExperts, experts: int, drop_mtp: bool) -> bytes:
    """config.json with the new number of experts, of groups where those changed, and without MTP layers where those are dropped.

    raw: what it says. UsageError if it names no such number.
    """
    config = stream.model.config.get_text_config(decoder=True)
    raw.pop("auto_map", None)
    section = text_section(stream.model.config, config, raw)
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
    return config_text(raw, section, drop_mtp)

"""A checkpoint of the same shapes whose experts have other weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import Journal, LayerStream, OutputFolder, check_finite
from ..checkpoint.atomic import raw_bytes
from ..checkpoint.convert import ADVICE
from ..checkpoint.dtypes import NAMES
from ..errors import UsageError
from ..model import MoELayer, find_layers
from .edit import Edit, expert_views
from .prune.write import Planned, Progress, ShardWriter, by_owner, config_text, write_checkpoint


class InPlace(ShardWriter):
    """What becomes of every tensor of a source. shapes: on disk, of those that belong to experts."""

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer]) -> None:
        self.stream, self.layers = stream, layers
        self._owner = {name: i for i, layer in enumerate(layers) for own in layer.owners for name in stream.disk_names(own)}
        self.shapes = {name: stream.source.info(name).shape for name in self._owner}
        self._tried = False

    @abstractmethod
    def rewrite(self, number: int, layer: MoELayer) -> None:
        """Other weights for a layer that is in memory."""

    def bytes(self) -> tuple[int, int]:
        """Of the experts: as they are, and as they are written."""
        infos = {name: self.stream.source.info(name) for name in self._owner}
        after = sum(Planned(info, self.shapes[name], None).bytes for name, info in infos.items())
        return sum(info.bytes for info in infos.values()), after

    def plan(self, shard: str) -> list[Planned]:
        infos = [info for info in self.stream.source.header(shard).tensors if self.stream.source.is_read(info)]
        return [Planned(info, self.shapes.get(info.name, info.shape), self._owner.get(info.name)) for info in infos]

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        return by_owner(shard, tensors, self.stream.source.stored, self._checked)

    def made(self, i: int) -> dict[str, Tensor]:
        """The parameters of a layer as they are written, by their full names; the source's are in memory, and may be changed."""
        self.rewrite(i, self.layers[i])
        return state_of(self.stream.model, self.layers[i])

    def _checked(self, i: int) -> Mapping[str, Tensor]:
        """The same by the names on disk."""
        layer, source = self.layers[i], self.stream.source
        with in_memory(self.stream, layer):
            state = state_of(self.stream.model, layer)
            for name, parameter in state.items():
                check_finite(name, parameter, source.folder.name)
            if not self._tried:
                self._try(i, state)
            found = self.named(i, self.made(i))
        for name, tensor in found.items():
            if NAMES[tensor.dtype] != source.info(name).dtype:
                raise UsageError(f"tensor '{name}' comes back with another dtype than it has on disk", ADVICE)
        return found

    def named(self, i: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same under the names on disk, all of which the source has."""
        found = self.stream.disk_form(state)
        wanted = {name for name, owner in self._owner.items() if owner == i}
        if different := sorted(wanted ^ set(found)):
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        return found

    def _try(self, i: int, state: dict[str, Tensor]) -> None:
        """Once per run: an untouched layer must come back with the bytes it has on disk, else the family is not safe."""
        for name, tensor in self.named(i, state).items():
            if raw_bytes(tensor) != raw_bytes(self.stream.source.stored(self.stream.source.info(name))):
                raise UsageError(f"tensor '{name}' changes when transformers loads and saves it", ADVICE)
        self._tried = True


class EditedCheckpoint(InPlace):
    """A source under an edit that removes no expert."""

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer]) -> None:
        super().__init__(stream, layers)
        self._edit: Edit | None = None

    def write(self, edit: Edit, out: OutputFolder, journal: Journal, progress: Progress) -> None:
        """Everything into `out.work`; see `SlicedCheckpoint.write`."""
        self._edit = edit
        raw = self.stream.source.config()
        write_checkpoint(self.stream.source, config_text(raw, raw, False), self, out, journal, progress)

    def rewrite(self, number: int, layer: MoELayer) -> None:
        assert self._edit is not None
        if self._edit.changes(number):
            self._edit.edit(number, layer)

    def read_back(self, folder: Path) -> None:
        """The first layer of what was written, as transformers loads it, is the source's after the edit."""
        written = LayerStream(folder)
        layer = find_layers(written.model)[0]
        with in_memory(self.stream, self.layers[0]) as source, in_memory(written, layer):
            self.rewrite(0, source)
            if any(not torch.equal(a, b) for a, b in zip(expert_views(source), expert_views(layer), strict=True)):
                raise UsageError(f"the experts of '{layer.name}' do not come back through transformers", ADVICE)


@contextmanager
def in_memory(stream: LayerStream, layer: MoELayer) -> Iterator[MoELayer]:
    """A layer's experts in the type of the files, for the length of a block."""
    with ExitStack() as stack, torch.no_grad():
        for owner in layer.owners:
            stack.enter_context(stream.module(owner, disk_dtype=True))
        yield layer


def state_of(model: nn.Module, layer: MoELayer) -> dict[str, Tensor]:
    """The parameters of a layer by their full names."""
    prefixes = tuple(f"{owner}." for owner in layer.owners)
    return {name: tensor.detach() for name, tensor in model.named_parameters() if name.startswith(prefixes)}

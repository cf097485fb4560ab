"""A checkpoint without some of its neurons: narrower experts where all are equally wide, else zeros in place.

Shapes: E experts, f neurons each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import Journal, LayerStream, OutputFolder, check_finite
from ...checkpoint.atomic import raw_bytes
from ...checkpoint.convert import ADVICE, place
from ...checkpoint.dtypes import NAMES
from ...checkpoint.mtp import mtp_layers
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ..prune.remove import block_tensors
from ..prune.write import Planned, Progress, ShardWriter, config_text, write_checkpoint
from .mask import clear, per_neuron
from .narrower import OTHERWISE, Narrower


def equal_widths(kept: Sequence[Tensor]) -> int | None:
    """The width that all experts of all layers keep; None where they differ. kept: [E, f] (bool) per layer."""
    counts = {int(n) for mask in kept for n in mask.sum(1)}
    return counts.pop() if len(counts) == 1 else None


class SlicedCheckpoint(ShardWriter):
    """What becomes of every tensor of a source. width: that of all experts; None: the shapes stay, and zeros take the places.

    UsageError for a family whose files or configuration cannot express it.
    """

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], width: int | None) -> None:
        self.stream, self.layers = stream, layers
        self.narrower = None if width is None else Narrower(stream, layers, width)
        if self.narrower and not layers[-1].is_dense and (found := mtp_layers(stream, block_tensors(stream, layers[-1]))):
            raise UsageError(
                f"'{found[0].root.rstrip('.')}' is a layer for multi-token prediction with experts of its own", OTHERWISE
            )
        self.kept: Sequence[Tensor] = ()
        self._owner = {name: i for i, layer in enumerate(layers) for own in layer.owners for name in stream.disk_names(own)}
        self.shapes = {name: stream.source.info(name).shape for name in self._owner}
        if self.narrower:
            for i in range(len(layers)):
                self.shapes |= {name: tuple(t.shape) for name, t in self._named(i, self._empty(i)).items()}
        self._tried = False

    def bytes(self) -> tuple[int, int]:
        """Of the experts: as they are, and as they are written."""
        infos = {name: self.stream.source.info(name) for name in self._owner}
        after = sum(Planned(info, self.shapes[name], None).bytes for name, info in infos.items())
        return sum(info.bytes for info in infos.values()), after

    def write(self, kept: Sequence[Tensor], out: OutputFolder, journal: Journal, progress: Progress) -> None:
        """Everything into `out.work`, shard by shard; a finished shard is a unit of `journal`. kept: [E, f] (bool) per layer, as many in
        every expert as the width says. Peak memory: one layer, and what is written of it. CorruptError names a tensor that is not finite.
        """
        self.kept = kept
        raw = self.narrower.raw if self.narrower else self.stream.source.config()
        write_checkpoint(self.stream.source, config_text(raw, raw, False), self, out, journal, progress)

    def plan(self, shard: str) -> list[Planned]:
        infos = [info for info in self.stream.source.header(shard).tensors if self.stream.source.is_read(info)]
        return [Planned(info, self.shapes.get(info.name, info.shape), self._owner.get(info.name)) for info in infos]

    def values(self, shard: str, tensors: Sequence[Planned]) -> Iterator[tuple[Planned, Tensor]]:
        for t in tensors:
            if t.owner is None:
                data = self.stream.source.stored(t.info)
                check_finite(t.info.name, data, shard)
                yield t, data
        for i in sorted({t.owner for t in tensors if t.owner is not None}):
            made = self._made(i)
            yield from ((t, made[t.info.name]) for t in tensors if t.owner == i)

    def read_back(self, folder: Path) -> None:
        """The first layer of what was written, as transformers loads it, is the source's with these neurons."""
        written = LayerStream(folder)
        layer = find_layers(written.model)[0]
        with self._loaded(self.stream, self.layers[0]) as source, self._loaded(written, layer):
            clear(source, self.kept[0])
            pairs = zip(per_neuron(source), per_neuron(layer), strict=True)
            if any(not torch.equal(_only(a, self.kept[0]), _only(b, self._places())) for a, b in pairs):
                raise UsageError(f"the experts of '{layer.name}' do not come back through transformers", ADVICE)

    def _places(self) -> Tensor:
        """[E, f'] (bool): where the neurons of the first layer that stay are in what is written."""
        return torch.ones(len(self.kept[0]), int(self.kept[0][0].sum()), dtype=torch.bool) if self.narrower else self.kept[0]

    @contextmanager
    def _loaded(self, stream: LayerStream, layer: MoELayer) -> Iterator[MoELayer]:
        with ExitStack() as stack, torch.no_grad():
            for owner in layer.owners:
                stack.enter_context(stream.module(owner, disk_dtype=True))
            yield layer

    def _made(self, i: int) -> Mapping[str, Tensor]:
        """The tensors of a layer as they are written, by their names on disk."""
        layer, source = self.layers[i], self.stream.source
        with self._loaded(self.stream, layer):
            for name, parameter in self._state(layer).items():
                check_finite(name, parameter, source.folder.name)
            if not self._tried:
                self._try(layer)
            if self.narrower:
                found = self._named(i, self._narrowed(i))
            else:
                clear(layer, self.kept[i])
                found = self._named(i, self._state(layer))
        for name, tensor in found.items():
            if NAMES[tensor.dtype] != source.info(name).dtype:
                raise UsageError(f"tensor '{name}' comes back with another dtype than it has on disk", ADVICE)
        return found

    def _narrowed(self, i: int) -> dict[str, Tensor]:
        """The state of the narrower layer, filled from the source's, which is loaded."""
        assert self.narrower is not None
        old, new = self.layers[i], self.narrower.layers[i]
        loaded, empty = self._state(old), self._state(new)
        try:
            for name, tensor in empty.items():
                own = loaded[name]
                fresh = own.clone() if own.shape == tensor.shape else torch.empty(tensor.shape, dtype=own.dtype)
                place(self.narrower.model, name, nn.Parameter(fresh, requires_grad=False))
            for a, b in zip(per_neuron(old), per_neuron(new), strict=True):
                b.copy_(_only(a, self.kept[i]).view(b.shape))
            return {name: tensor.clone() for name, tensor in self._state(new).items()}
        finally:
            for name, tensor in empty.items():
                place(self.narrower.model, name, nn.Parameter(tensor, requires_grad=False))

    def _empty(self, i: int) -> dict[str, Tensor]:
        assert self.narrower is not None
        return self._state(self.narrower.layers[i])

    def _state(self, layer: MoELayer) -> dict[str, Tensor]:
        """The parameters of a layer by their full names."""
        model = self.narrower.model if self.narrower and layer in self.narrower.layers else self.stream.model
        prefixes = tuple(f"{owner}." for owner in layer.owners)
        return {name: tensor.detach() for name, tensor in model.named_parameters() if name.startswith(prefixes)}

    def _named(self, i: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same under the names on disk, all of which the source has."""
        found = self.stream.disk_form(state)
        wanted = {name for name, owner in self._owner.items() if owner == i}
        if different := sorted(wanted ^ set(found)):
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        return found

    def _try(self, layer: MoELayer) -> None:
        """Once per run: an untouched layer must come back with the bytes it has on disk, else the family is not safe."""
        for name, tensor in self._named(self.layers.index(layer), self._state(layer)).items():
            if raw_bytes(tensor) != raw_bytes(self.stream.source.stored(self.stream.source.info(name))):
                raise UsageError(f"tensor '{name}' changes when transformers loads and saves it", ADVICE)
        self._tried = True


def _only(view: Tensor, kept: Tensor) -> Tensor:
    """The rows of neurons that stay, of all experts one after the other. view [E, f, ...]."""
    return view[kept.to(view.device)]

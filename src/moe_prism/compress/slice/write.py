"""A checkpoint without some of its neurons: narrower experts where all are equally wide, else zeros in place.

Shapes: E experts, f neurons each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import Journal, LayerStream, OutputFolder
from ...checkpoint.convert import ADVICE, place
from ...checkpoint.mtp import mtp_layers
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ..in_place import InPlace, in_memory, state_of
from ..prune.remove import block_tensors
from ..prune.write import Progress, config_text, write_checkpoint
from .mask import clear, per_neuron
from .narrower import OTHERWISE, Narrower


def equal_widths(kept: Sequence[Tensor]) -> int | None:
    """The width that all experts of all layers keep; None where they differ. kept: [E, f] (bool) per layer."""
    counts = {int(n) for mask in kept for n in mask.sum(1)}
    return counts.pop() if len(counts) == 1 else None


class SlicedCheckpoint(InPlace):
    """What becomes of every tensor of a source. width: that of all experts; None: the shapes stay, and zeros take the places.

    UsageError for a family whose files or configuration cannot express it.
    """

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], width: int | None) -> None:
        super().__init__(stream, layers)
        self.narrower = None if width is None else Narrower(stream, layers, width)
        if self.narrower and not layers[-1].is_dense and (found := mtp_layers(stream, block_tensors(stream, layers[-1]))):
            raise UsageError(
                f"'{found[0].root.rstrip('.')}' is a layer for multi-token prediction with experts of its own", OTHERWISE
            )
        self.kept: Sequence[Tensor] = ()
        if self.narrower:
            for i in range(len(layers)):
                self.shapes |= {name: tuple(t.shape) for name, t in self.named(i, self._empty(i)).items()}

    def write(self, kept: Sequence[Tensor], out: OutputFolder, journal: Journal, progress: Progress) -> None:
        """Everything into `out.work`, shard by shard; a finished shard is a unit of `journal`. kept: [E, f] (bool) per layer, as many in
        every expert as the width says. Peak memory: one layer, and what is written of it. CorruptError names a tensor that is not finite.
        """
        self.kept = kept
        raw = self.narrower.raw if self.narrower else self.stream.source.config()
        write_checkpoint(self.stream.source, config_text(raw, raw, False), self, out, journal, progress)

    def rewrite(self, number: int, layer: MoELayer) -> None:
        clear(layer, self.kept[number])

    def read_back(self, folder: Path) -> None:
        """The first layer of what was written, as transformers loads it, is the source's with these neurons."""
        written = LayerStream(folder)
        layer = find_layers(written.model)[0]
        with in_memory(self.stream, self.layers[0]) as source, in_memory(written, layer):
            clear(source, self.kept[0])
            pairs = zip(per_neuron(source), per_neuron(layer), strict=True)
            if any(not torch.equal(_only(a, self.kept[0]), _only(b, self._places())) for a, b in pairs):
                raise UsageError(f"the experts of '{layer.name}' do not come back through transformers", ADVICE)

    def made(self, i: int) -> dict[str, Tensor]:
        return self._narrowed(i) if self.narrower else super().made(i)

    def _places(self) -> Tensor:
        """[E, f'] (bool): where the neurons of the first layer that stay are in what is written."""
        return torch.ones(len(self.kept[0]), int(self.kept[0][0].sum()), dtype=torch.bool) if self.narrower else self.kept[0]

    def _narrowed(self, i: int) -> dict[str, Tensor]:
        """The state of the narrower layer, filled from the source's, which is loaded."""
        assert self.narrower is not None
        old, new = self.layers[i], self.narrower.layers[i]
        loaded, empty = state_of(self.stream.model, old), self._empty(i)
        try:
            for name, tensor in empty.items():
                own = loaded[name]
                fresh = own.clone() if own.shape == tensor.shape else torch.empty(tensor.shape, dtype=own.dtype)
                place(self.narrower.model, name, nn.Parameter(fresh, requires_grad=False))
            for a, b in zip(per_neuron(old), per_neuron(new), strict=True):
                b.copy_(_only(a, self.kept[i]).view(b.shape))
            return {name: tensor.clone() for name, tensor in self._empty(i).items()}
        finally:
            for name, tensor in empty.items():
                place(self.narrower.model, name, nn.Parameter(tensor, requires_grad=False))

    def _empty(self, i: int) -> dict[str, Tensor]:
        assert self.narrower is not None
        return state_of(self.narrower.model, self.narrower.layers[i])


def _only(view: Tensor, kept: Tensor) -> Tensor:
    """The rows of neurons that stay, of all experts one after the other. view [E, f, ...]."""
    return view[kept.to(view.device)]

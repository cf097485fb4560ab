"""What happens to a checkpoint's tensors before its experts are packed: inputs evened out, and what rounding may lose where.

Shapes: E experts, d hidden, f neurons, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...checkpoint import LayerStream
from ...errors import UsageError
from ...model import MoELayer
from ...model.norm_readers import NormReaders, unscaled

Samples = Sequence[tuple[Tensor, Tensor]]
"""Of every expert of a layer: inputs [S, d] and routing weights [S]."""
GATE, UP, DOWN = 0, 1, 2


class Preparation:
    """Nothing happens: tensors are packed as they are."""

    def changed(self, name: str, tensor: Tensor) -> Tensor:
        """What a tensor on disk becomes before it is written or packed."""
        return tensor

    def gram(self, name: str) -> Tensor | None:
        """[i, i] of the inputs of an expert's matrix, for a codec that feeds errors back; None: it does not."""
        return None


class Origin(NamedTuple):
    """Which matrix of the model a tensor on disk is."""

    layer: int
    expert: int
    matrix: int


def origins(stream: LayerStream, layers: Sequence[MoELayer]) -> dict[str, Origin]:
    """Of every tensor on disk that is one expert's matrix. Found by writing numbers into the layers and having them named as on disk."""
    found = {}
    for number, layer in enumerate(layers):
        for owner in layer.owners:
            stream.materialise(owner)
        views = [(GATE, layer.gate), (UP, layer.up), (DOWN, layer.down)]
        with torch.no_grad():
            for matrix, view in ((m, v) for m, v in views if v is not None):
                view.copy_(((torch.arange(layer.num_experts) * 3 + matrix).to(view)[:, None, None]).expand_as(view))
        for owner in layer.owners:
            for name, tensor in stream.disk_form(stream.state(owner)).items():
                if tensor.ndim == 2:
                    code = int(tensor.flatten()[0])
                    found[name] = Origin(number, code // 3, code % 3)
        for owner in layer.owners:
            stream.release(owner)
    return found


@dataclass
class Calibrated(Preparation):
    """factors: of every tensor on disk that is scaled, what its last dimension is multiplied by [d], and the offset of a norm's weight,
    which is divided. samples: of every layer, where errors are fed back.
    """

    stream: LayerStream
    layers: Sequence[MoELayer]
    origins: Mapping[str, Origin]
    scales: Sequence[Tensor] = ()
    factors: Mapping[str, tuple[Tensor, float | None]] = field(default_factory=dict)
    samples: Sequence[Samples] = ()

    def __post_init__(self) -> None:
        self._names = {origin: name for name, origin in self.origins.items()}
        if self.samples and any(layer.up_bias is not None or layer.weighs_input for layer in self.layers):
            raise UsageError(
                "errors of these experts cannot be fed back: their neurons have biases", "leave --error-feedback out"
            )

    def changed(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.factors:
            s, offset = self.factors[name]
            return tensor * s.to(tensor) if offset is None else unscaled(tensor, s, offset)
        origin = self.origins.get(name)
        if origin is None or origin.matrix == DOWN or not self.scales:
            return tensor
        return tensor * self.scales[origin.layer].to(tensor)

    @torch.no_grad()
    def gram(self, name: str) -> Tensor | None:
        origin = self.origins.get(name)
        if origin is None or not self.samples:
            return None
        x, weight = self.samples[origin.layer][origin.expert]
        if not len(x):
            return None
        if origin.matrix == DOWN:
            x = self._activations(origin, x)
        elif self.scales:
            x = x / self.scales[origin.layer]
        x = x * weight[:, None]
        return x.T @ x

    def _activations(self, origin: Origin, x: Tensor) -> Tensor:
        """[S, f] of the source's own experts."""
        layer, source = self.layers[origin.layer], self.stream.source
        names = [self._names.get(origin._replace(matrix=matrix)) for matrix in (GATE, UP)]
        gate, up = (None if n is None else nn.functional.linear(x, source.tensor(n).float()) for n in names)
        assert up is not None
        return layer.activate(gate, up)


def factors_of(stream: LayerStream, readers: NormReaders, s: Tensor) -> dict[str, tuple[Tensor, float | None]]:
    """`Calibrated.factors` of one layer: its norm, and what reads it beside the experts."""
    norm, offset, beside = readers.names
    found: dict[str, tuple[Tensor, float | None]] = {}
    for leaf, own in (("weight", offset), ("bias", 0.0)):
        divided: tuple[Tensor, float | None] = (s, own)
        found.update(dict.fromkeys(stream.feeds({f"{norm}.{leaf}"}), divided))
    multiplied: tuple[Tensor, float | None] = (s, None)
    found.update(dict.fromkeys(stream.feeds(set(beside)), multiplied))
    for name in found:
        if stream.source.info(name).shape[-1] != len(s):
            raise UsageError(f"'{name}' does not lie on disk as the model has it", "use a method that scales no inputs")
    return found

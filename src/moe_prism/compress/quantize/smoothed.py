"""Experts in fewer bits behind evened-out inputs: what divides a layer's input is folded into the norm, the router and the experts.

At 16 bits nothing changes; where all factors are powers of two, not even a last bit. Shapes: E experts, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...model import MoELayer
from ...model.norm_readers import norm_readers
from ...model.scores import router_weight
from ...schema import check
from ...schema.points import REMAKE, SmoothForm
from ..changes import Change
from ..codec import Codec
from .change import QuantizeChange, Widths, codec_of, widths_of
from .decoded import Encoded, decoded
from .smooth import factors, rounded_router

WHERE = "settings of the weight change 'smooth'"


@dataclass(frozen=True)
class SmoothChange(Change):
    """stored: how experts are kept. exponents: per layer and channel the power of 2^(1 / steps) that inputs are divided by.

    router: bits of its weights, 0: they stay; clips: of each layer, how far their range reaches.
    """

    stored: QuantizeChange
    exponents: tuple[tuple[int, ...], ...]
    steps: int = 1
    router: int = 0
    clips: tuple[float, ...] = ()
    name: ClassVar[str] = "smooth"
    touches_weights: ClassVar[bool] = True

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SmoothChange:
        form = check(SmoothForm, settings, WHERE, REMAKE)
        stored = QuantizeChange(codec_of(form), widths_of(form), form.group)
        return cls(stored, tuple(map(tuple, form.exponents)), form.steps, form.router, tuple(form.clips))

    def settings(self) -> dict[str, Any]:
        rows = [list(row) for row in self.exponents]
        return self.stored.settings() | {"exponents": rows, "steps": self.steps, "router": self.router, "clips": list(self.clips)}

    @property
    def codec(self) -> Codec:
        return self.stored.codec

    @property
    def group(self) -> int:
        return self.stored.group

    @property
    def resident_share(self) -> float:
        return self.stored.resident_share

    def widths(self, layers: Sequence[MoELayer]) -> Widths:
        return self.stored.widths(layers)

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor:
        return self.stored.bytes_per_weight(layers, layer, stored)

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        if [len(row) for row in self.exponents] != [layer.hidden for layer in layers] or (
            self.router and len(self.clips) != len(layers)
        ):
            raise UsageError("the smoothing is not that of this model's layers", REMAKE)
        return self._installed(model, layers)

    @contextmanager
    def _installed(self, model: Any, layers: Sequence[MoELayer]) -> Iterator[Encoded]:
        scales = [factors(row, self.steps) for row in self.exponents]
        with ExitStack() as stack:
            for readers, s in zip(norm_readers(model, layers), scales, strict=True):
                stack.enter_context(readers.scaled(s, experts=False))
            if self.router:
                for layer, clip in zip(layers, self.clips, strict=True):
                    stack.enter_context(_rounded(model, layer, self.router, clip))
            widths = self.widths(layers)
            yield stack.enter_context(decoded(model, layers, self.codec, self.group, widths, scales))


@contextmanager
def _rounded(model: nn.Module, layer: MoELayer, bits: int, clip: float) -> Iterator[None]:
    """A router in fewer bits inside the block."""
    weight = router_weight(model, layer)
    saved = weight.clone()
    with torch.no_grad():
        weight.copy_(rounded_router(weight.float(), bits, clip))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(saved)

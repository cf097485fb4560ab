"""Which neurons of a layer's experts stay: one description for memory, files and JSON. Shapes: E experts, f neurons each."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import CorruptError
from ...schema.points import REMAKE


@dataclass(frozen=True)
class KeptNeurons:
    """experts E, neurons f; data: a bit for each neuron, 1 where it stays, expert after expert, filled up with zeros to whole bytes."""

    experts: int
    neurons: int
    data: bytes

    @classmethod
    def of(cls, mask: Tensor) -> KeptNeurons:
        """mask [E, f] (bool)."""
        return cls(mask.shape[0], mask.shape[1], np.packbits(mask.cpu().numpy().reshape(-1)).tobytes())

    @classmethod
    def from_text(cls, experts: int, neurons: int, text: str, where: str) -> KeptNeurons:
        """The inverse of `text`. CorruptError for what is none."""
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise CorruptError(f"{where}: the neurons that stay are no base64", REMAKE) from error
        count = experts * neurons
        if len(data) != -(-count // 8) or (count % 8 and data[-1] & ((1 << (8 - count % 8)) - 1)):
            raise CorruptError(f"{where}: the neurons that stay are not those of {experts} experts of {neurons}", REMAKE)
        return cls(experts, neurons, data)

    @property
    def text(self) -> str:
        """Base64, for JSON."""
        return base64.b64encode(self.data).decode()

    def mask(self) -> Tensor:
        """[E, f] (bool)."""
        bits = np.unpackbits(np.frombuffer(self.data, np.uint8), count=self.experts * self.neurons)
        return torch.from_numpy(bits.astype(bool)).view(self.experts, self.neurons)

    @property
    def count(self) -> int:
        """Neurons that stay."""
        return int(self.mask().sum())

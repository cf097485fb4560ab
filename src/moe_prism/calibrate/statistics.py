"""The result of a calibration: per layer and collector, named tensors; on disk one safetensors file per layer beside a JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class LayerStatistics:
    """Statistics of one MoE layer, keyed collector -> name -> tensor."""

    name: str
    values: dict[str, dict[str, Tensor]]

    def inputs(self, expert: int) -> tuple[Tensor, Tensor]:
        """Sampled inputs x [S, d] (float32) and routing weights [S] of one expert."""
        tokens = self.values["tokens"]
        kept = int(tokens["kept"][expert])
        return tokens["x"][expert, :kept].float(), tokens["weight"][expert, :kept]

    def kept(self) -> list[int]:
        """Sampled tokens per expert; none where no sample was kept."""
        return [int(n) for n in self.values["tokens"]["kept"]] if "tokens" in self.values else []

    def flat(self) -> dict[str, Tensor]:
        return {f"{c}.{k}": v.contiguous() for c, state in self.values.items() for k, v in state.items()}

    @staticmethod
    def unflat(name: str, tensors: dict[str, Tensor]) -> LayerStatistics:
        """From flat names, as a file holds them, back to collectors and their statistics."""
        values: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            collector, _, inner = key.partition(".")
            values.setdefault(collector, {})[inner] = tensor
        return LayerStatistics(name, values)


@dataclass
class Statistics:
    """All layers, some of the windows for later runs of the whole model, and the facts of the pass (text, tokens, hashes, settings)."""

    layers: list[LayerStatistics]
    profile: Tensor  # token ids [n, length], evenly spaced over the calibration text
    facts: dict[str, Any] = field(default_factory=dict)

    def starved(self, minimum: int) -> list[tuple[int, int, int]]:
        """(layer, expert, sampled tokens) of every expert with fewer than `minimum` tokens."""
        return [(i, e, n) for i, layer in enumerate(self.layers) for e, n in enumerate(layer.kept()) if n < minimum]

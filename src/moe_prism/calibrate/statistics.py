"""The result of a calibration: per layer and collector, named tensors; on disk one safetensors file per layer beside a JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class LayerStatistics:
    """Statistics of one MoE layer, keyed collector -> name -> tensor; domains: of each domain of the text, what has it (`has_domains`)."""

    name: str
    values: dict[str, dict[str, Tensor]]
    domains: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    def inputs(self, expert: int) -> tuple[Tensor, Tensor]:
        """Sampled inputs x [S, d] (float32) and routing weights [S] of one expert."""
        tokens = self.values["tokens"]
        kept = int(tokens["kept"][expert])
        return tokens["x"][expert, :kept].float(), tokens["weight"][expert, :kept]

    def kept(self) -> list[int]:
        """Sampled tokens per expert; none where no sample was kept."""
        return [int(n) for n in self.values["tokens"]["kept"]] if "tokens" in self.values else []

    def flat(self) -> dict[str, Tensor]:
        """By one name each: collector.name, or domain/collector.name."""
        every = {"": self.values, **{f"{domain}/": values for domain, values in self.domains.items()}}
        return {
            f"{d}{c}.{k}": v.contiguous() for d, values in every.items() for c, state in values.items() for k, v in state.items()
        }

    @staticmethod
    def unflat(name: str, tensors: dict[str, Tensor]) -> LayerStatistics:
        """From flat names, as a file holds them, back to collectors and their statistics."""
        found = LayerStatistics(name, {})
        for key, tensor in tensors.items():
            domain, _, rest = key.rpartition("/")
            collector, _, inner = rest.partition(".")
            values = found.domains.setdefault(domain, {}) if domain else found.values
            values.setdefault(collector, {})[inner] = tensor
        return found


@dataclass
class Statistics:
    """All layers, some of the windows for later runs of the whole model, and the facts of the pass (text, tokens, hashes, settings)."""

    layers: list[LayerStatistics]
    profile: Tensor  # token ids [n, length], evenly spaced over the calibration text
    facts: dict[str, Any] = field(default_factory=dict)

    def starved(self, minimum: int) -> list[tuple[int, int, int]]:
        """(layer, expert, sampled tokens) of every expert with fewer than `minimum` tokens."""
        return [(i, e, n) for i, layer in enumerate(self.layers) for e, n in enumerate(layer.kept()) if n < minimum]

"""Keys: the numbers by which caches, predictors and stores name loadable weights."""

from __future__ import annotations

from dataclasses import dataclass

Key = int
"""One loadable unit of weights: a sub-expert (or a whole expert where N = 1) of one layer, numbered by `KeySpace`."""


@dataclass(frozen=True)
class KeySpace:
    """L layers x E experts x N parts; keys count through the parts of an expert first, then its layer's experts, then layers.

    planes: of every sub-expert, the upper one first: they are parts, too.
    """

    layers: int
    experts: int
    parts: int = 1
    planes: int = 1

    def key(self, layer: int, expert: int, part: int = 0) -> Key:
        return (layer * self.experts + expert) * self.parts + part

    def layer(self, key: Key) -> int:
        return key // (self.experts * self.parts)

    def expert(self, key: Key) -> int:
        return key // self.parts % self.experts

    def part(self, key: Key) -> int:
        return key % self.parts

    def of_layer(self, layer: int) -> range:
        """All keys of one layer."""
        return range(layer * self.experts * self.parts, (layer + 1) * self.experts * self.parts)

    def describe(self, key: Key) -> str:
        part = f" part {self.part(key)}" if self.parts > 1 else ""
        return f"layer {self.layer(key)} expert {self.expert(key)}{part}"

    def __len__(self) -> int:
        return self.layers * self.experts * self.parts

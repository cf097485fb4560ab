"""The contract of a codec: how a matrix of weights is stored in fewer bits.

A stored matrix is a sequence of planes. Each plane says the width that is reached with it, so a lower width reads a prefix of what a higher
one reads. Shapes: [..., o, i] o outputs, i inputs; leading dimensions (experts) are encoded together. A group is g neighbouring inputs of
one output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import UsageError


@dataclass(frozen=True)
class Plane:
    """What is read to get from the width before it to `bits`: tensors as they lie on disk."""

    bits: float
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class Planes:
    """A stored matrix. shape [..., o, i]; group: inputs that share a scale; planes: of rising width."""

    shape: tuple[int, ...]
    group: int
    planes: Sequence[Plane]

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that it can be read at."""
        return tuple(plane.bits for plane in self.planes)

    def upto(self, bits: float) -> Sequence[Plane]:
        """The planes that a width reads. UsageError for one that is not stored."""
        if bits not in self.widths:
            known = ", ".join(f"{width:g}" for width in self.widths)
            raise UsageError(f"a matrix is not stored at {bits:g} bits", f"give one of: {known}")
        return self.planes[: self.widths.index(bits) + 1]

    def bytes(self, bits: float) -> int:
        """What reading it at a width reads."""
        return sum(plane.bytes for plane in self.upto(bits))


@dataclass(frozen=True)
class Codec(ABC):
    """One way to store a matrix; its fields are its settings, all plain JSON values."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    """Where it comes from; empty: our own, or common knowledge."""
    widths: ClassVar[tuple[float, ...]]
    """Bits per weight that it can be asked for, rising; what a scale takes comes on top."""
    groups: ClassVar[tuple[int, ...]] = (32, 64, 128)
    """Inputs that may share a scale, the default first."""
    takes_gram: ClassVar[bool] = False
    """Whether it can spread its errors over the inputs that a Gram matrix tells of."""

    @abstractmethod
    def encode(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None = None) -> Planes:
        """Store matrix [..., o, i] at a width and all lower ones that come with it.

        gram [..., i, i]: sums of x x^T over calibration inputs, for codecs that take one. UsageError for a width, a group or a Gram
        matrix that this codec does not take.
        """

    @abstractmethod
    def decode(self, planes: Planes, bits: float) -> Tensor:
        """The matrix at a width, float32 [..., o, i]. Reads the planes up to that width and no others."""

    @abstractmethod
    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        """What `encode(...).bytes(bits)` is for a matrix of a shape, without storing one."""

    @classmethod
    def example(cls) -> Sequence[Codec]:
        """The settings that the generic tests try."""
        return [cls()]

    @property
    def legal(self) -> tuple[float, ...]:
        """The widths that these settings allow."""
        return self.widths

    def checked(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None) -> None:
        """UsageError for what this codec cannot store."""
        self.check(bits, group)
        if gram is None:
            return
        if not self.takes_gram:
            raise UsageError(f"codec '{self.name}' feeds no errors back", "leave the Gram matrix out")
        if gram.shape[-1] != matrix.shape[-1] or gram.shape[-2] != matrix.shape[-1]:
            raise UsageError(
                f"a Gram matrix of shape {tuple(gram.shape)} for {matrix.shape[-1]} inputs", "it must be one of these inputs"
            )

    def check(self, bits: float, group: int) -> None:
        """UsageError for a width or a group that this codec does not have."""
        for what, asked, legal in (("bits", bits, self.legal), ("inputs per group", group, self.groups)):
            if asked not in legal:
                raise UsageError(
                    f"codec '{self.name}' has no {asked:g} {what}", f"choose one of: {', '.join(f'{n:g}' for n in legal)}"
                )

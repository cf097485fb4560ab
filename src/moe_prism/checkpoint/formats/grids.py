"""What codes and scales can be: the values of a code before it is scaled, and the numbers a format can store as a scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

RoundScale = Callable[[Tensor], Tensor]
"""Scales in float32 -> the nearest ones that the format can store, in float32."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code of E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5.3.3)."""
FP4_STEPS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbouring magnitudes
POWERS = (torch.uint8, torch.float8_e8m0fnu)


class Grid(ABC):
    """The values a code can have. Codes are uint8 or int8 tensors."""

    ratios: ClassVar[tuple[float, ...]]
    """Shares of the scale that just reaches a group's largest value, tried when a group is quantized."""

    @property
    @abstractmethod
    def top(self) -> float:
        """The largest magnitude, of one sign."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """float32, same shape."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The codes nearest to float32 values; those beyond the grid get its end."""

    def nearest(self, values: Tensor) -> Tensor:
        """What `decode` makes of `encode`; may overwrite the values."""
        return self.decode(self.encode(values))


@dataclass(frozen=True)
class Integers(Grid):
    """Whole numbers low..high."""

    low: int
    high: int
    ratios: ClassVar[tuple[float, ...]] = tuple(0.66 + 0.02 * i for i in range(24))

    @property
    def top(self) -> float:
        return (self.high - self.low) / 2

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()

    def encode(self, values: Tensor) -> Tensor:
        return values.round().clamp(self.low, self.high).to(torch.int8 if self.low < 0 else torch.uint8)

    def nearest(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(self.low, self.high)


@dataclass(frozen=True)
class Float8(Grid):
    """An 8-bit float type of torch; codes are its bytes."""

    dtype: torch.dtype
    ratios: ClassVar[tuple[float, ...]] = (1.0,)  # its steps grow with the value: a smaller scale wins nothing (measured on nano)

    @property
    def top(self) -> float:
        return torch.finfo(self.dtype).max

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(self.dtype).float()

    def encode(self, values: Tensor) -> Tensor:
        return values.clamp(-self.top, self.top).to(self.dtype).view(torch.uint8)


@dataclass(frozen=True)
class Float4(Grid):
    """E2M1; codes are 0..15."""

    ratios: ClassVar[tuple[float, ...]] = tuple(0.6 + 0.03 * i for i in range(22))

    @property
    def top(self) -> float:
        return FP4[7]

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(FP4)[codes.int()]

    def encode(self, values: Tensor) -> Tensor:
        magnitude = torch.bucketize(values.abs(), torch.tensor(FP4_STEPS))
        return (magnitude + 8 * (values < 0)).to(torch.uint8)


def scale_values(stored: Tensor) -> Tensor:
    """Scales as float32: floats as they are, bytes as exponents of two with bias 127 (E8M0)."""
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()


def stored_scales(scales: Tensor, like: Tensor) -> Tensor:
    """Scales that `rounding(like.dtype)` gave, in the type and shape that they have on disk."""
    scales = scales.reshape(like.shape)
    return (torch.log2(scales) + 127).round().to(torch.uint8) if like.dtype == torch.uint8 else scales.to(like.dtype)


def rounding(dtype: torch.dtype) -> RoundScale:
    """How scales of this type on disk are rounded. Powers of two go up, so that nothing is cut off that need not be."""
    if dtype in POWERS:
        return lambda scales: torch.exp2(torch.log2(scales.clamp_min(2.0**-126)).ceil().clamp(-126, 127))
    limit = torch.finfo(dtype).max
    return lambda scales: scales.clamp_max(limit).to(dtype).float()

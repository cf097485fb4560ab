"""Constants in the place of experts: what they are, their plain form, and a model run with them. C constants, d hidden."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.constant import route_constants
from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...model.extra import constants as constant_experts
from ...schema.points import REMAKE

MOST_BYTES = 1 << 28  # of one layer's
STORED = torch.bfloat16


@dataclass(frozen=True)
class Constants:
    """The vectors [C, d] of a layer, rounded to bfloat16 so that the form in a file is half as long and every form is the same."""

    rows: int
    data: bytes

    @classmethod
    def of(cls, vectors: Tensor) -> Constants:
        """vectors [C, d], any type."""
        return cls(len(vectors), vectors.to(STORED).contiguous().view(torch.uint8).numpy().tobytes())

    @classmethod
    def from_text(cls, text: object, rows: int, where: str) -> Constants:
        """The inverse of `text`, for `rows` experts. CorruptError for what is none."""
        try:
            data = base64.b64decode(text if isinstance(text, str) and len(text) < 2 * MOST_BYTES else "!", validate=True)
        except ValueError as error:
            raise CorruptError(f"'constants' of {where} is no base64", REMAKE) from error
        if not rows or not data or len(data) % (rows * STORED.itemsize):
            raise CorruptError(f"'constants' of {where} are not {rows} vectors", REMAKE)
        found = cls(rows, data)
        if not torch.isfinite(found.tensor()).all():
            raise CorruptError(f"'constants' of {where} are not finite", REMAKE)
        return found

    @property
    def text(self) -> str:
        """Base64, for JSON."""
        return base64.b64encode(self.data).decode()

    @property
    def values(self) -> int:
        """C d."""
        return len(self.data) // STORED.itemsize

    def tensor(self) -> Tensor:
        """[C, d] in bfloat16."""
        return torch.frombuffer(bytearray(self.data), dtype=STORED).view(self.rows, -1)


def mean_outputs(found: Mapping[str, Tensor], gone: Sequence[int]) -> Constants:
    """The mean output of experts `gone`, from the collector `means`; zero where no token chose one."""
    ids = torch.tensor(list(gone))
    return Constants.of(found["sum"][ids].double() / found["count"][ids].double().clamp(min=1)[:, None])


@contextmanager
def substituted(layer: MoELayer, kept: Sequence[int], gone: Sequence[int], vectors: Constants) -> Iterator[None]:
    """Let constants take the place of experts `gone` inside the block. UsageError for vectors of another length than the model's."""
    values = vectors.tensor()
    if values.shape != (len(gone), layer.hidden):
        raise UsageError(f"the constants have {values.shape[1]} numbers, '{layer.name}' has {layer.hidden}", REMAKE)
    before = layer.extra, layer.router_rows
    handles = route_constants(layer.module, kept, gone, layer.num_experts, lambda: values)
    layer.extra = constant_experts(values)
    layer.router_rows = torch.tensor([*range(layer.num_experts), *gone])
    try:
        yield
    finally:
        layer.extra, layer.router_rows = before
        for handle in handles:
            handle.remove()

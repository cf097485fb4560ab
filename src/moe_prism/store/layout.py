"""What a record is: the weights of one sub-expert in one aligned piece, gate | up | down, one neuron after the other, then biases.

Shapes: d hidden, m neurons of a sub-expert.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..compress.codec.int8_rows import Int8Rows
from ..model import MoELayer

ALIGN = 4096  # bytes: what direct reads ask of offsets, lengths and addresses
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def padded(size: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class RecordLayout:
    """One record: [matrices x m rows of d] of `dtype` (gate if there is one, up, down), then [gate bias] and up bias, m each.

    Its int8 form: float32 scales, one per row, biases in `dtype`, then at the very end one byte per weight.
    """

    hidden: int
    block: int
    has_gate: bool
    has_bias: bool
    dtype: str
    planes: ClassVar[int] = 1
    """Records of a sub-expert."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return self.torch_dtype.itemsize

    @property
    def rows(self) -> int:
        return (3 if self.has_gate else 2) * self.block

    @property
    def weights(self) -> int:
        return self.rows * self.hidden

    @property
    def biases(self) -> int:
        return self.rows - self.block if self.has_bias else 0

    @property
    def bytes(self) -> int:
        """Of a record, padding included."""
        return padded((self.weights + self.biases) * self.item)

    @property
    def low_bytes(self) -> int:
        """Of the int8 form, padding included."""
        return padded(self.weights + 4 * self.rows + self.biases * self.item)

    def records(self, layer: MoELayer, parts: int) -> Tensor:
        """All records of a layer, uint8 [E * parts, bytes]."""
        shape = (layer.num_experts * parts, -1)
        matrices = [layer.gate, layer.up, layer.down.transpose(1, 2)]
        biases = [layer.gate_bias, layer.up_bias] if self.has_bias else []
        pieces = [t.reshape(shape) for t in (*matrices, *biases) if t is not None]
        flat = torch.cat(pieces, 1).to(self.torch_dtype).view(torch.uint8)
        return torch.nn.functional.pad(flat, (0, self.bytes - flat.shape[1]))

    def lowered(self, records: Tensor) -> Tensor:
        """The int8 forms, uint8 [n, low_bytes], of records uint8 [n, bytes], by the codec `int8-rows`."""
        numbers = records[:, : (self.weights + self.biases) * self.item].view(self.torch_dtype)
        plane = Int8Rows().encode(numbers[:, : self.weights].reshape(-1, self.rows, self.hidden)).planes[0].tensors
        head = torch.cat([plane["scale"].view(torch.uint8), numbers[:, self.weights :].contiguous().view(torch.uint8)], 1)
        gap = torch.zeros(len(records), self.low_bytes - self.weights - head.shape[1], dtype=torch.uint8)
        return torch.cat([head, gap, plane["codes"].flatten(1).view(torch.uint8)], 1)

    def raise_(self, slot: Tensor) -> None:
        """Turn the int8 form at the end of a slot (uint8 [bytes]) into a record, in place.

        Rows are widened from the first on; what is written stays behind what is still to be read, because a number takes at least
        two bytes and the int8 weights end where the slot ends.
        """
        head = slot[self.bytes - self.low_bytes :][: 4 * self.rows + self.biases * self.item].clone()
        scale, biases = head[: 4 * self.rows].view(torch.float32), head[4 * self.rows :]
        steps = slot[self.bytes - self.weights :].view(torch.int8).view(self.rows, self.hidden)
        wide = slot[: self.weights * self.item].view(self.torch_dtype).view(self.rows, self.hidden)
        for first in range(0, self.rows, ROWS):
            last = min(self.rows, first + ROWS)
            wide[first:last] = steps[first:last].float() * scale[first:last, None]
        slot[self.weights * self.item : (self.weights + self.biases) * self.item] = biases

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, layer: MoELayer, parts: int) -> Self:
        """The layout of a layer's sub-experts, `parts` per expert, in the layer's own dtype."""
        name = str(layer.up.dtype).removeprefix("torch.")
        return cls(layer.hidden, layer.width // parts, layer.gate is not None, layer.up_bias is not None, name)


ROWS = 64  # widened at a time: they are copied first, and the copy stays in the cache

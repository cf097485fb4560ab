"""The arena: equal slots of memory that hold records, seen as a layer whose experts are the slots, so that executors run on it as it is.

Shapes: S slots, d hidden, m neurons of a sub-expert, R rows of a result.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

from ..elastic.base import LayerParts
from ..elastic.execute.decode_products import few_outputs
from ..elastic.execute.plain import grouped
from ..elastic.execute.tiled import tiled
from ..errors import DoesNotFit
from ..model import MoELayer
from ..model.base import ExpertsFn
from .layout import RecordLayout
from .wanted import Floats, Ints

UNSHARED_WORK = 1 << 22  # multiplications up to which sharing them out among threads costs more than it saves
UNGROUPED_WORK = 1 << 24  # where there is but one thread: up to which grouping the rows does


def slots_in(memory: int, resident: int, size: int, keys: int, least: int = 1) -> int:
    """How many records of `size` bytes `memory` bytes hold beside `resident` ones; never more than there are keys.

    DoesNotFit below `least`, the records of one sub-expert.
    """
    slots = min(keys, (memory - resident) // size)
    if slots < least:
        raise DoesNotFit(
            f"{memory} bytes of expert memory hold no sub-expert: predictors take {resident}, one sub-expert {least * size}",
            f"give at least {resident + least * size}",
        )
    return slots


class Arena:
    """`slots` records in anonymous, page-aligned memory: `memory` uint8 [S, bytes], `parts` the layer of them."""

    def __init__(self, slots: int, layout: RecordLayout, like: MoELayer) -> None:
        self.mapped = mmap.mmap(-1, slots * layout.bytes)
        self.memory = torch.frombuffer(self.mapped, dtype=torch.uint8).view(slots, layout.bytes)
        self.parts, self.weights = LayerParts(ArenaLayer(self.memory, layout, like), 1, 0), layout.weights

    @property
    def bytes(self) -> int:
        return len(self.mapped)

    def outputs(self, x: Tensor, row: Ints, weight: Floats, slot: Ints) -> Floats:
        """[R, d]: weight [R] x output of slot [R] for the rows row [R] of x."""
        bound = UNGROUPED_WORK if torch.get_num_threads() == 1 else UNSHARED_WORK
        found = few_outputs(self.parts, x, row, weight, slot) if len(row) * self.weights <= bound else None
        if found is not None:
            return found
        keep = torch.ones(len(row), 1, 1, dtype=torch.bool)
        rows, slots = torch.from_numpy(row), torch.from_numpy(slot).unsqueeze(1)
        factor = torch.from_numpy(weight).to(x.dtype).unsqueeze(1)
        out = tiled(self.parts, x, slots, factor, keep, rows)
        if out is None:
            out = grouped(self.parts, x[rows], slots, factor, keep)
        return out.float().numpy()


class ArenaLayer(MoELayer):
    """The slots as experts of m neurons each. Weights stay in the dtype of the records; `activations` and `project` widen them."""

    def __init__(self, memory: Tensor, layout: RecordLayout, like: MoELayer) -> None:
        self.name, self.module, self.index = "arena", nn.Module(), 0
        self.num_experts, self.hidden, self.width = len(memory), layout.hidden, layout.block
        self._like, self._has_gate, self._has_bias = like, layout.has_gate, layout.has_bias
        numbers = memory.view(layout.torch_dtype)
        self._matrices: Tensor = torch.unflatten(numbers[:, : layout.weights], 1, (-1, layout.block, layout.hidden))
        self._biases: Tensor = torch.unflatten(numbers[:, layout.weights : layout.weights + layout.biases], 1, (-1, layout.block))

    @property
    def gate(self) -> Tensor | None:
        return self._matrices[:, 0] if self._has_gate else None

    @property
    def up(self) -> Tensor:
        return self._matrices[:, -2]

    @property
    def down(self) -> Tensor:
        return self._matrices[:, -1].transpose(1, 2)

    @property
    def gate_bias(self) -> Tensor | None:
        return self._biases[:, 0] if self._has_bias and self._has_gate else None

    @property
    def up_bias(self) -> Tensor | None:
        return self._biases[:, -1] if self._has_bias else None

    @property
    def down_bias(self) -> Tensor | None:
        return None

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self._like.activate(gate, up)

    def activate_joined(self, both: Tensor) -> Tensor:
        return self._like.activate_joined(both)

    def activations(self, expert: int, x: Tensor, neurons: slice | Tensor = slice(None)) -> Tensor:
        def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
            own = None if bias is None else bias[expert, neurons].to(x.dtype)
            return nn.functional.linear(x, weight[expert, neurons].to(x.dtype), own)

        gate = self.gate
        return self.activate(None if gate is None else rows(gate, self.gate_bias), rows(self.up, self.up_bias))

    def project(self, expert: int, a: Tensor, neurons: slice = slice(None)) -> Tensor:
        return nn.functional.linear(a, self.down[expert, :, neurons].to(a.dtype))

    def storage(self) -> tuple[int, ...]:
        return (self._matrices.data_ptr(),)

    def install(self, function: ExpertsFn) -> None:
        raise NotImplementedError("an arena is no part of a model")

    def uninstall(self) -> None:
        raise NotImplementedError("an arena is no part of a model")

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError("an arena is no part of a model")

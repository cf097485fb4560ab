"""Kept slots on a GPU: two Triton kernels (gate and up with the activation; down with the routing weight) over tiles of equal sub-expert.

Weights are read in place, any strides, no copies. The launch depends on the shape of the batch alone, never on what is kept, and nothing
is read back to the host: a CUDA graph captured at one budget replays at any other, if the budget is a tensor on the device.

Two ways to add up a token's slots:

- `deterministic`: the down kernel writes one float32 row per slot and a third kernel adds a token's rows in slot order; the tile is the
  same for every batch. So a token's output has the same bits alone and in any batch, for the same kept slots. Costs T k N d floats
  of scratch and one pass over the kept ones. Grouping the down kernel by token instead would lose the reuse of weights between tokens.
- `atomic`: float32 atomic additions into [T, d], and a tile that suits the batch. Less memory; the last bits vary from run to run.

Correctness is tested, on the CPU through Triton's interpreter. Speed on a GPU has not been measured yet: nothing is claimed, and the tiles
below are reasoned, not tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ...model import MoELayer
from ..base import LayerParts
from ..planes import PackedPlanes
from .plain import grouped
from .triton_align import Tiles, align

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LINE = 128  # bytes of a row that one step of a matrix product reads
SMALLEST = 16  # the smallest side of a matrix product


@dataclass(frozen=True)
class Tile:
    """What one program computes: slots x neurons of gate and up, slots x output columns of down."""

    rows: int
    neurons: int
    columns: int
    warps: int
    stages: int
    atomic: bool = False  # whether sums are added up by atomic additions


SMALL = Tile(rows=16, neurons=32, columns=64, warps=4, stages=4)
FIXED = Tile(rows=64, neurons=32, columns=64, warps=4, stages=4)
LARGE = Tile(rows=128, neurons=64, columns=128, warps=8, stages=3)
BY_LOAD = ((16, SMALL), (64, FIXED))  # up to that many tokens per expert, else LARGE


def deterministic(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """x [T, d], index [T, k], weight [T, k], keep [T, k, N] bool -> [T, d]; the sum of `execute.reference`."""
    if refusal(parts, x):
        return grouped(parts, x, index, weight, keep)
    return _run(parts, x, index, weight, keep, FIXED)


def atomic(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The same sum, added up by atomic additions."""
    if refusal(parts, x):
        return grouped(parts, x, index, weight, keep)
    load = index.numel() / parts.layer.num_experts
    tile = next((tile for most, tile in BY_LOAD if load <= most), LARGE)
    return _run(parts, x, index, weight, keep, replace(tile, atomic=True))


def from_planes(parts: LayerParts, planes: Planes, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor | None:
    """The sum of `execute.reference` over what planes decode to, without writing it out; None where the kernels cannot."""
    if refusal(parts, x, stored=False):
        return None
    return _run(parts, x, index, weight, keep, FIXED, planes)


def refusal(parts: LayerParts, x: Tensor, *, stored: bool = True) -> str | None:
    """Why the kernels cannot compute this layer and `grouped` does instead; None if they can. stored: by the weights as they are."""
    layer = parts.layer
    if not _installed():
        return "Triton is not installed"
    if not (x.is_cuda or (x.device.type == "cpu" and _kernels().INTERPRETED)):
        return f"the tensors are on {x.device.type}"
    if _kernels().INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 as integers"
    if layer.gate is None or (stored and layer.gate.stride() != layer.up.stride()):
        return "there is no gate matrix of the up matrix's shape"
    if any(bias is not None for bias in (layer.gate_bias, layer.up_bias, layer.down_bias)):
        return "the experts have biases"
    if x.dtype not in DTYPES or (stored and x.dtype != layer.up.dtype):
        return f"inputs are {x.dtype}, weights {layer.up.dtype}"
    if torch.is_grad_enabled() and (x.requires_grad or layer.up.requires_grad):
        return "gradients are wanted"
    return None if activation(layer) else "the activation is none of " + ", ".join(ACTIVATIONS)


_activations: WeakKeyDictionary[MoELayer, str | None] = WeakKeyDictionary()


def activation(layer: MoELayer) -> str | None:
    """Which of ACTIVATIONS satisfies activate(gate, up) = act(gate) * up on a grid that reaches far out, where some families clamp.

    Asks the device once per layer.
    """
    if layer not in _activations:
        line = torch.cat([torch.linspace(-8, 8, 65), torch.tensor([-1e3, -30.0, 30.0, 1e3])]).to(layer.up.device)
        gate, up = (side.reshape(1, -1) for side in torch.meshgrid(line, line, indexing="ij"))
        with torch.no_grad():
            found = layer.activate(gate, up)
            names = [n for n, act in ACTIVATIONS.items() if torch.allclose(found, act(gate) * up, rtol=1e-5, atol=1e-6)]
        _activations[layer] = names[0] if names else None
    return _activations[layer]


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _kernels() -> Any:
    from ...kernels import triton_kernels

    return triton_kernels


Planes = tuple[PackedPlanes, PackedPlanes, PackedPlanes, int]
"""Of gate, up and down, and the bits that are read."""


# Keeps more than six parameters: the five of every way to compute slots, and how.
def _run(
    parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tile: Tile, planes: Planes | None = None
) -> Tensor:
    tokens, hidden = x.shape
    slots = keep.numel()
    if not slots:
        return torch.zeros_like(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        launch = Launch(parts, keep, align(index, keep, parts.layer.num_experts, tile.rows), tile, planes)
        a = x.new_empty(slots, parts.block)
        _gate_up(launch, x, a)
        if tile.atomic:
            out = x.new_zeros(tokens, hidden, dtype=torch.float32)
            _down(launch, a, weight, out)
            return out.to(x.dtype)
        rows = x.new_empty(slots, hidden, dtype=torch.float32)
        _down(launch, a, weight, rows)
        return _combine(rows, keep, torch.empty_like(x, memory_format=torch.contiguous_format))


class Launch(NamedTuple):
    """What both kernels of a layer are started with."""

    parts: LayerParts
    keep: Tensor
    tiles: Tiles
    tile: Tile
    planes: Planes | None

    @property
    def list(self) -> tuple[Tensor, ...]:
        return self.tiles.slots, self.tiles.group, self.tiles.first, self.tiles.end

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK": self.parts.block, "N_SUB": self.parts.n_sub, "PER_TOKEN": self.keep[0].numel(),
            "ROWS": self.tile.rows, "num_warps": self.tile.warps, "num_stages": self.tile.stages,
        }  # fmt: skip

    def matrices(self, *names: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Of gate, up and down those that a kernel reads, and how they are stored."""
        if self.planes is None:
            return tuple(getattr(self.parts.layer, name) for name in names), {}
        *each, bits = self.planes
        found = dict(zip(("gate", "up", "down"), each, strict=True))
        return tuple(found[name].tiles for name in names), found[names[0]].constants(bits)


def _gate_up(launch: Launch, x: Tensor, a: Tensor) -> None:
    parts, layer, columns = launch.parts, launch.parts.layer, _side(launch.tile.neurons, launch.parts.block)
    (gate, up), stored = launch.matrices("gate", "up")
    _kernels().gate_up[len(launch.tiles.group) * -(-parts.block // columns),](
        x, gate, up, a, *launch.list, *x.stride(), *gate.stride()[:3],
        D=layer.hidden, ACT=activation(layer), COLUMNS=columns, DEPTH=_side(LINE // x.element_size(), layer.hidden),
        **launch.constants(), **stored,
    )  # fmt: skip


def _down(launch: Launch, a: Tensor, weight: Tensor, out: Tensor) -> None:
    parts, layer = launch.parts, launch.parts.layer
    columns = _side(launch.tile.columns, layer.hidden)
    (down,), stored = launch.matrices("down")
    _kernels().down[len(launch.tiles.group) * -(-layer.hidden // columns),](
        a, down, weight.reshape(-1), out, *launch.list, *down.stride()[:3],
        D=layer.hidden, ATOMIC=launch.tile.atomic, COLUMNS=columns, DEPTH=_side(LINE // a.element_size(), parts.block),
        **launch.constants(), **stored,
    )  # fmt: skip


def _combine(rows: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    columns = _side(512, out.shape[1])
    grid = out.shape[0] * -(-out.shape[1] // columns)
    kept = keep.contiguous().view(torch.uint8)
    _kernels().combine[grid,](rows, kept, out, D=out.shape[1], PER_TOKEN=keep[0].numel(), COLUMNS=columns)
    return out


def _side(most: int, size: int) -> int:
    """The power of two a tile uses of a side of this size."""
    return min(most, max(SMALLEST, 1 << (size - 1).bit_length()))

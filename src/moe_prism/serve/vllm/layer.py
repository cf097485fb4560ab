"""One MoE layer below full budget, on the weights as vLLM's CPU kernel holds them: no copy, no second layout.

Routing, selection and compensation are those of `elastic.layer`; what is written here is where the weights lie and how the kept ones are
multiplied. E experts, d hidden, f neurons, N sub-experts per expert, r gate neurons of each, T tokens, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...elastic import Elastic, LayerParts
from ...elastic.execute.base import Executor, Settled
from ...elastic.side_tensors import CUTOFFS, REPAIR
from ...errors import UsageError
from ...kernels.packed_tiles import WIDTH
from ...model.gate_neurons import GateNeurons
from ...point import OperatingPoint
from .packed_products import PackedGroups, add, dot
from .placed import Elsewhere, Placed, nobody
from .refusal import refusal
from .stripe import ALONE, Share

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def unknown_side(side: Mapping[str, Tensor]) -> str | None:
    """What of prism.safetensors changes results below full budget and is not computed here; None if nothing."""
    return "a repaired W_down" if REPAIR in side else None


def pack(rows: Tensor) -> Tensor:
    """[E, rows, d] -> [E, rows / 16, d, 16], the order of vLLM's CPU kernel. rows % 16 == 0."""
    experts, count, depth = rows.shape
    return rows.view(experts, count // WIDTH, WIDTH, depth).transpose(2, 3).contiguous()


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """w13 [E, 2f, d] and w2 [E, d, f] as vLLM holds them: packed, float32 or bfloat16. activation: vLLM's name of it.

    share: which worker this is of those that hold stripes of the blocks (f is then what one holds). placed: which experts these are, where
    other workers hold the rest; E is then what one holds.
    """

    w13: Tensor
    w2: Tensor
    activation: str
    share: Share = ALONE
    placed: Placed | None = None

    @property
    def experts(self) -> int:
        """Of the layer, wherever they lie."""
        return len(self.w2) if self.placed is None else len(self.placed.local)

    @property
    def adds(self) -> bool:
        """Whether this worker adds what comes beside kept slots."""
        return self.share.rank == 0 and (self.placed is None or self.placed.rank == 0)

    def check(self, n_sub: int) -> None:
        """UsageError if the kept blocks could not be multiplied where they lie."""
        experts, hidden, width = self.w2.shape
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"experts with the activation '{self.activation}' run at full budget only", "serve without a quality below 1"
            )
        if self.w13.shape != (experts, 2 * width, hidden) or width % (n_sub * WIDTH):
            raise UsageError(
                f"sub-experts of {width}/{n_sub} neurons do not fit vLLM's CPU kernel, which keeps {WIDTH} together",
                "refactor with fewer sub-experts per expert",
            )
        if self.w13.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"experts in {self.w13.dtype} run at full budget only", "use --dtype bfloat16 or float32")

    def gate_neurons(self, name: str, index: int, n_sub: int, gates: int) -> GateNeurons:
        """A float32 copy of what selection reads, the first `gates` neurons of every block: with more workers, the first one's."""
        experts, hidden, width = self.w2.shape
        ids = (torch.arange(n_sub)[:, None] * (width // n_sub) + torch.arange(gates)).flatten()
        first = self.w13.detach().view(experts, -1, hidden, WIDTH).transpose(2, 3)
        down = self.w2.detach().view(experts, -1, width, WIDTH)
        tensors = {
            "gate": first[:, ids // WIDTH, ids % WIDTH],
            "up": first[:, (ids + width) // WIDTH, (ids + width) % WIDTH],
            "down": down[:, :, ids].permute(0, 2, 1, 3).flatten(2),
        }
        act = ACTIVATIONS[self.activation]
        shared = {k: self.share.first(t.contiguous()) if gates else t.contiguous() for k, t in tensors.items()}
        if self.placed is not None:
            shared = {k: self.placed.every(t) for k, t in shared.items()}
        return GateNeurons(name, index, width * self.share.size, shared, partial(_gated, act))


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return act(gate) * up


class Packed(Executor):
    """Multiplies the kept blocks of packed weights."""

    def __init__(self, weights: PackedWeights) -> None:
        self.experts, self.hidden, self.width = weights.w2.shape
        self.first = weights.w13.detach().view(self.experts, -1, self.hidden, WIDTH)
        self.down = weights.w2.detach().view(self.experts, -1, self.width, WIDTH)
        self.activate, self.placed = ACTIVATIONS[weights.activation], weights.placed

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        keep = settled.keep
        if self.placed is not None:
            index = self.placed.rows(index)
            keep = keep & (index >= 0)[:, :, None]
        groups = PackedGroups.of(index, keep, self.experts)
        m = self.width // keep.shape[2]
        out = torch.zeros(x.shape)
        pre = torch.zeros(len(groups.row), 2 * m)
        dot(x, groups, self.first, 2, groups.slot, pre)
        a = self.activate(pre[:, :m]).mul_(pre[:, m:]).mul_(weight.reshape(-1)[groups.choice, None])
        add(a, groups, self.down, out)
        return out


class PackedElastic(Elastic):
    """`Elastic` over the MoE layers of a model that vLLM runs."""

    def __init__(
        self,
        model: Any,
        weights: Sequence[tuple[str, PackedWeights | None]],
        sides: Sequence[dict[str, Tensor]],
        *,
        n_sub: int,
        gates: int,
        k: int,
    ) -> None:
        """weights: name and weights of every layer, None where another worker runs it; sides: its side tensors, of all layers. UsageError
        if the shapes do not fit together.

        Where several workers hold parts, all choose the same slots, since they see the same inputs.
        """
        self.executors: dict[int, Executor] = {}
        self._k = k
        layer_parts = []
        first = next(own for _, own in weights if own is not None)
        for i, ((name, held), side) in enumerate(zip(weights, sides, strict=True)):
            own = held or first
            own.check(n_sub)
            experts, hidden = own.experts, own.w2.shape[1]
            if CUTOFFS not in side or tuple(side["ridge"].shape) != (experts, n_sub, hidden + n_sub * gates + 1):
                raise UsageError("prism.safetensors does not belong to these weights", "refactor the model again")
            if held is None:
                width, act = own.w2.shape[2] * own.share.size, ACTIVATIONS[own.activation]
                layer = GateNeurons(name, i, width, nobody(experts, n_sub * gates, hidden), partial(_gated, act))
            else:
                layer = held.gate_neurons(name, i, n_sub, gates)
            layer_parts.append(LayerParts(layer, n_sub, gates, side))
            self.executors[i] = Elsewhere() if held is None else Packed(held)
        super().__init__(model, layer_parts)
        for made, (_, held) in zip(self.layers, weights, strict=True):
            made.adds = held is None or held.adds

    def executor_of(self, parts: LayerParts) -> Executor:
        return self.executors[parts.layer.index]

    @property
    def k(self) -> int:
        return self._k

    def normalises(self) -> bool:
        raise UsageError(
            "an operating point leaves open what happens to the routing weights", "measure it with `moe-prism frontier`"
        )

    def check(self, point: OperatingPoint) -> None:
        problem = refusal(point)
        if problem:
            raise UsageError(f"vLLM does not run this operating point: {problem}", "choose another")

    def run(self, layer: int, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """[T, d] in x's dtype of a layer, at the current step. x [T, d], index [T, k] and weight [T, k] of the router."""
        rows, ids, factors = x.float().contiguous(), index.long().contiguous(), weight.float().contiguous()
        return self.layers[layer](rows, ids, factors).to(x.dtype)

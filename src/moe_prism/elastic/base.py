"""The contracts of selection. Shapes: T tokens, k experts per token, N sub-experts per expert, r gate neurons per sub-expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model import MoELayer
from ..model.base import linear
from .side_tensors import POSITIONS, TENSORS, LayerShape, check_shapes, check_values


@dataclass
class LayerParts:
    """What makes one layer elastic, beside its (permuted) weights: the side tensors of `prism.safetensors`."""

    layer: MoELayer
    n_sub: int
    gates: int  # r, the first neurons of every block
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored: Any = field(default=None, init=False, repr=False)  # of `products.Stored`: where the weights are
    few: Any = field(default=None, init=False, repr=False)  # of `few.few_outputs`: the same, prepared
    times: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # of `times.times_of`: how long which way takes
    ready: Any = field(default=None, init=False, repr=False)  # of `one_call.ready`: the same for the compiled call
    whole: Any = field(default=None, init=False, repr=False)  # of `times.whole_parts`: the layer with one block per expert

    def check(self, k: int | None) -> None:
        """CorruptError for side tensors that are not those of this layer: compiled code trusts their shapes. k: experts per token."""
        layer, where = self.layer, f"side tensors of '{self.layer.name}'"
        width = self.stored_block * self.n_sub
        check_shapes(where, self.tensors, LayerShape(layer.num_experts, layer.hidden, width, self.n_sub, self.gates, k))
        check_values(where, {name: tensor for name, tensor in self.tensors.items() if name in TENSORS})

    @property
    def block(self) -> int:
        """Neurons per sub-expert."""
        return self.layer.width // self.n_sub

    @property
    def stored_block(self) -> int:
        """The same of a layer whose gate neurons alone are in memory: those of a sub-expert wherever it lies."""
        return int(getattr(self.layer, "full_width", self.layer.width)) // self.n_sub

    def neurons(self, n: int) -> slice:
        return slice(n * self.block, (n + 1) * self.block)

    def gate_ids(self) -> Tensor:
        """Neuron ids [N, r] of the gate neurons, the same for every expert because each block begins with them."""
        device = self.layer.up.device
        return torch.arange(self.n_sub, device=device)[:, None] * self.block + torch.arange(self.gates, device=device)[None, :]


@dataclass(frozen=True)
class Slots:
    """The candidate slots of a batch at one layer. `norms()` runs the scorer, once, when a rule asks for it."""

    x: Tensor  # [T, d]
    index: Tensor  # [T, k]
    weight: Tensor  # [T, k] routing weights
    valid: Tensor  # [T, k] bool: false where the router chose no expert
    n_sub: int
    norms: Callable[[], Tensor]  # -> [T, k, N] estimated block output norms, >= 0

    def values(self) -> Tensor:
        """[T, k, N]: routing weight x estimated output norm; -1 where there is no expert. Computed once."""
        return self._values

    @cached_property
    def _values(self) -> Tensor:
        norms = self.norms()
        if is_compiled(norms, self.weight):
            from ..kernels.selection import slot_values  # compiles on first use

            out = torch.empty(norms.shape)
            slot_values(self.weight.numpy(), norms.numpy(), self.valid.numpy(), out.numpy())
            return out
        v = self.weight.float().abs()[:, :, None] * norms
        return v.masked_fill(~self.valid[:, :, None], -1.0)


FEW, SMALL = 64, 1 << 15  # choices, or inputs of all choices, up to which they are computed one by one


def are_few(x: Tensor, index: Tensor) -> bool:
    """Whether preparing a job for the choices index [T, k] of x [T, d] would take longer than to compute them one by one."""
    count = index.numel()
    return count <= FEW or count * x.shape[1] <= SMALL


def is_compiled(*tensors: Tensor) -> bool:
    """Whether the functions of `marks.py` take these: float32 on a CPU, no gradients."""
    return all(t.dtype == torch.float32 and t.is_cpu and not t.requires_grad for t in tensors)


class Scorer(ABC):
    """Estimates the output norm of every candidate block without computing it."""

    reads_all: ClassVar[bool] = False
    """Whether it computes the blocks after all, and not their gate neurons alone."""

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts

    @abstractmethod
    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """x [T, d], index [T, k] (all valid) -> [T, k, N] float32, >= 0."""

    @abstractmethod
    def parameters_per_expert(self) -> int:
        """Extra weights read for one chosen expert, gate neurons not included."""

    def parameters_per_token(self) -> int:
        """Extra weights read once per token, whatever experts it chose."""
        return 0

    @staticmethod
    def fit(parts: LayerParts, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        """Side tensors this scorer reads, from the sampled inputs [S_e, d] of each expert; none for most."""
        return {}

    @property
    def reads_gates(self) -> bool:
        """Whether the gate neurons of every candidate block are computed, kept or not."""
        return True


class Rule(ABC):
    """Decides which candidate slots are kept."""

    acts: ClassVar[str] = "slots"
    paper: ClassVar[str] = ""
    """Where it comes from; empty: our own."""
    needs_norms = True
    is_continuous = False
    """Whether budgets between two slot counts give different results."""
    units: ClassVar[tuple[str, ...]] = ("slots", "bytes")
    """What its budget may be a share of (`point.base.UNITS`)."""
    controls: ClassVar[tuple[str, ...]] = ("none",)
    """Who its budget may be held for (`point.base.CONTROLS`)."""
    maker: ClassVar[str] = ""
    """The method that makes its points, as "package.module:attribute", where they hold more than a budget."""
    depends_on_batch: ClassVar[bool] = False
    """Whether the slots of a token depend on the other tokens of its batch: never served unless it is named."""
    compiled: NDArray[np.float32] | None = None
    """What `marks.select` needs to decide as this rule does: its levels, an empty array for top-K; None = it cannot."""

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts

    @abstractmethod
    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        """budget [T] in (0, 1] (kept slots / all slots) -> keep [T, k, N] bool.

        At least one slot of a token with any valid expert is kept; budget 1 keeps every valid slot.
        """

    @classmethod
    def share_kept(cls, parts: LayerParts) -> Tensor:
        """[POSITIONS] float64: the share of a layer's slots that is kept at evenly spaced positions of the dial, where it is known."""
        return torch.linspace(0, 1, POSITIONS, dtype=torch.float64)

    def count(self, slots: Slots, budget: Tensor) -> Tensor:
        """K [T]: the budget as a number of slots, at least 1."""
        total = slots.valid.sum(1) * slots.n_sub
        return torch.minimum((budget * total).round().long().clamp(min=1), total)


def gate_activations(parts: LayerParts, x: Tensor, expert: int) -> Tensor:
    """|activations| [S, N, r] of one expert's gate neurons for rows x [S, d]."""
    ids = parts.gate_ids().flatten()
    return parts.layer.activations(expert, x, ids).abs().float().view(len(x), parts.n_sub, parts.gates)


def gate_activations_each(parts: LayerParts, x: Tensor, experts: Tensor) -> Tensor:
    """The same for rows x [S, d] that each have an expert of their own, experts [S]: gathers S N r weight rows."""
    layer, ids = parts.layer, parts.gate_ids().flatten()

    def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.einsum("sd,smd->sm", x, weight[experts[:, None], ids].to(x.dtype))
        return out if bias is None else out + bias[experts[:, None], ids]

    gate = None if layer.gate is None else rows(layer.gate, layer.gate_bias)
    return layer.activate(gate, rows(layer.up, layer.up_bias)).abs().float().view(len(x), parts.n_sub, parts.gates)


def gate_activations_all(parts: LayerParts, x: Tensor, index: Tensor) -> Tensor:
    """The same [T, k, N, r] for x [T, d] and its choices index [T, k], without the host waiting for the device.

    To know which experts occur is to wait, so the gate neurons of all E experts are computed in one product: T E N r d multiplications
    each for gate and up, a share E N r / (k f) of the layer's own (3 % for OLMoE at N=4, r=1).
    """
    layer, width = parts.layer, parts.n_sub * parts.gates

    def first(rows: Tensor) -> Tensor:
        """The gate neurons' part of rows [E, f, ...], flat over experts, blocks and gate neurons."""
        return torch.unflatten(rows, 1, (parts.n_sub, parts.block))[:, :, : parts.gates].flatten(0, 2)

    def chosen(weight: Tensor, bias: Tensor | None) -> Tensor:
        out = linear(x, first(weight), None if bias is None else first(bias))
        return of_choices(out.view(-1, layer.num_experts, width), index).flatten(0, 1)

    gate = None if layer.gate is None else chosen(layer.gate, layer.gate_bias)
    return layer.activate(gate, chosen(layer.up, layer.up_bias)).abs().float().view(*index.shape, parts.n_sub, parts.gates)


def of_choices(values: Tensor, index: Tensor) -> Tensor:
    """Values [T, E, m] of all experts -> [T, k, m] of the chosen, index [T, k]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def per_expert(index: Tensor, num_experts: int, function: Callable[[int, Tensor], Tensor], width: int) -> Tensor:
    """Assemble [T, k, width] from function(e, token ids [S]) -> [S, width] over the experts that occur."""
    out = torch.zeros(*index.shape, width, device=index.device)
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            out.view(-1, width)[rows] = function(expert, rows // index.shape[1])
            start += count
    return out

"""One MoE layer behind one set of views, whatever its storage.

Shapes: E experts, d hidden, f neurons per expert, T tokens, k experts per token, S rows, m neurons of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .extra import ExtraExperts

INPUT_DTYPE = "input_dtype"
ExpertsFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, d], expert ids [T, k], routing weights [T, k]) -> [T, d]."""


@dataclass(frozen=True)
class ExpertLayout:
    """How a transformers experts module stores its tensors: the flags of `use_experts_implementation`."""

    is_concatenated: bool = True  # [gate | up], else gate and up rows alternate
    is_transposed: bool = False  # [E, in, out], else [E, out, in]
    has_bias: bool = False
    has_gate: bool = True


class MoELayer(ABC):
    """Read access to the experts of one layer, exact neuron permutation, and a seam for another experts function.

    `gate`, `up` [E, f, d] and `down` [E, d, f] are views: writing to them writes the model. `gate` is None for ungated experts,
    the biases are None where the family has none. `extra`: experts with ids from E on that hold no matrices. The layer adds what they
    add by itself; for installed functions and `stock` those ids, like negative ones, mean no expert.
    """

    name: str
    module: nn.Module
    index: int
    num_experts: int
    hidden: int
    width: int
    extra: ExtraExperts | None = None
    router_rows: Tensor | None = None  # the router's row of every id, extra experts included, where that is not the id itself
    calls_with_ids: bool = True  # the module itself is called as experts(hidden, ids, weights)
    weighs_input: bool = False  # x comes multiplied by the routing weight, which is 1 then

    @property
    def is_dense(self) -> bool:
        """Whether it is one MLP that no router chooses."""
        return self.num_experts == 1 and self.extra is None

    @property
    def block_name(self) -> str:
        """The module that routes and calls the experts."""
        return self.name.rpartition(".")[0]

    @property
    def owners(self) -> tuple[str, ...]:
        """The modules that hold the experts' weights and nothing else."""
        return (self.name,)

    @property
    @abstractmethod
    def gate(self) -> Tensor | None: ...

    @property
    @abstractmethod
    def up(self) -> Tensor: ...

    @property
    @abstractmethod
    def down(self) -> Tensor: ...

    @property
    def input_dtype(self) -> torch.dtype:
        """The type of x: that of the weights, but where `widen.widen` left the experts alone as they are stored."""
        found: torch.dtype = getattr(self.module, INPUT_DTYPE, self.up.dtype)
        return found

    @property
    def gate_bias(self) -> Tensor | None:
        return None

    @property
    def up_bias(self) -> Tensor | None:
        return None

    @property
    def down_bias(self) -> Tensor | None:
        """[E, d]: added once per chosen expert, before the routing weight."""
        return None

    @abstractmethod
    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The family's own gating of pre-activations [S, m]; elementwise over neurons."""

    def activate_joined(self, both: Tensor) -> Tensor:
        """The same of rows [S, 2m] = [gate | up], or [S, m] where there is no gate."""
        return self.activate(None, both) if self.gate is None else self.activate(*both.chunk(2, -1))

    @cached_property
    def is_silu(self) -> bool:
        """Whether the gating is silu(gate) x up, which compiled code computes itself: found by trying, since configurations vary."""
        if self.gate is None:
            return False
        scale = torch.tensor([0.1, 1.0, 10.0, 100.0]).repeat(4)[:, None]
        both = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * scale
        gate, up = both.chunk(2, -1)
        with torch.no_grad():
            return torch.allclose(self.activate_joined(both), nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-30)

    @abstractmethod
    def install(self, function: ExpertsFn) -> None:
        """Route this layer's expert computation through `function` until `uninstall`."""

    @abstractmethod
    def uninstall(self) -> None: ...

    @abstractmethod
    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The family's own experts computation, unaffected by `install`."""

    def refusal(self, model: nn.Module) -> str | None:
        """Why this layer's experts are not a sum over neurons although the formula is nearly ours; None if nothing is known."""
        return None

    def arrange(self) -> None:  # noqa: B027 - most storage needs nothing
        """Lay the weights out so that a block of neurons is contiguous in every matrix. Values and shapes stay."""

    def storage(self) -> tuple[int, ...]:
        """The addresses of the weights: different once they have been moved, converted or arranged."""
        return tuple(p.data_ptr() for p in self.module.parameters())

    def native(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The same by the implementation the model would use without us: what full budget costs."""
        return self.stock(x, index, weight)

    def activations(self, expert: int, x: Tensor, neurons: slice | Tensor = slice(None)) -> Tensor:
        """a [S, m] of rows x [S, d] for a contiguous block, or a list of ids [m], of one expert's neurons."""
        gate, up = self.gate, self.up
        g = None
        if gate is not None:
            g = linear(x, gate[expert, neurons], _row(self.gate_bias, expert, neurons))
        return self.activate(g, linear(x, up[expert, neurons], _row(self.up_bias, expert, neurons)))

    def project(self, expert: int, a: Tensor, neurons: slice = slice(None)) -> Tensor:
        """Output [S, d] of activations a [S, m] of a block, without the bias and the routing weight."""
        return linear(a, self.down[expert, :, neurons])

    def by_expert(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The layer's output [T, d] in the type of x, one expert's weights widened after the other: all at once would be a second layer."""
        out = torch.zeros_like(x)
        for e in torch.unique(index[is_expert(index, self.num_experts)]).tolist():
            token, choice = torch.where(index == e)
            y = self.project(e, self.activations(e, x[token]))
            y = y if self.down_bias is None else y + self.down_bias[e]
            out.index_add_(0, token, (y * weight[token, choice, None]).to(x.dtype))
        return out

    @torch.no_grad()
    def permute(self, perm: Tensor) -> None:
        """Reorder every expert's neurons in place: new neuron j is old perm[e, j] (perm [E, f]). The function is unchanged."""
        perm = perm.to(self.up.device, torch.long)
        neurons = torch.arange(self.width, device=perm.device).expand(self.num_experts, -1)
        if perm.shape != neurons.shape or not torch.equal(perm.sort(1).values, neurons):
            raise ValueError(f"{self.name}: expected permutations of {self.width} neurons for {self.num_experts} experts")
        rows = [view for view in (self.gate, self.up, self.gate_bias, self.up_bias) if view is not None]
        for e in range(self.num_experts):  # one expert at a time: the copy stays small
            for view in rows:
                view[e].copy_(view[e][perm[e]])
            self.down[e].copy_(self.down[e][:, perm[e]])

    def parameters_per_expert(self) -> int:
        """Weights (and biases) one chosen expert touches."""
        matrices = 3 if self.gate is not None else 2
        biases = sum(b[0].numel() for b in (self.gate_bias, self.up_bias, self.down_bias) if b is not None)
        return matrices * self.hidden * self.width + biases

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: E={self.num_experts}, d={self.hidden}, f={self.width})"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [S, d] times weight [m, d], in the type of x: weights stored in a narrower one are widened."""
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def is_expert(index: Tensor, experts: int) -> Tensor:
    """Where ids [T, k] name one of the experts that are weights, 0..experts - 1: [T, k] bool."""
    return index.clamp(0, experts - 1) == index


def _row(bias: Tensor | None, expert: int, neurons: slice | Tensor) -> Tensor | None:
    return None if bias is None else bias[expert, neurons]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@torch.no_grad()
def check_formula(model: nn.Module, layer: MoELayer, describe: str) -> str | None:
    """Compare our formula with the module's own forward on one random batch; None if equal, else what differs."""
    dtype = layer.up.dtype
    if dtype not in DTYPES:
        return f"{describe}: its weights are stored as {str(dtype).removeprefix('torch.')}, load the model without quantization"
    refusal = layer.refusal(model)
    if refusal or layer.up.is_meta:
        return refusal and f"{describe}: {refusal}"
    x, index, weight = _random_batch(layer)
    try:
        expected = layer.stock(x, index, weight)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        return f"{describe}: its forward could not be called as experts(hidden, index, weight): {error}"
    if not isinstance(expected, Tensor) or expected.numel() != x.numel():
        return f"{describe}: its forward returns something else than one output row per token"
    ours = torch.cat([_one_row(layer, x[t : t + 1], int(index[t]), weight[t]) for t in range(len(x))]).float()
    if not (torch.isfinite(ours).all() and torch.isfinite(expected).all()):
        return f"{describe}: its output is not finite, the weights hold NaN or infinite values"
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    scale = float(ours.abs().max() + 1e-6)
    if not torch.allclose(ours, expected.reshape(ours.shape).float(), rtol=tolerance, atol=tolerance * scale):
        return f"{describe}: its output is not weight * down(act(gate x) * up x)"
    return None


def _random_batch(layer: MoELayer) -> tuple[Tensor, Tensor, Tensor]:
    """Four rows to four experts, each with its own routing weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.hidden, generator=generator).to(layer.up.device, layer.up.dtype)
    index = torch.arange(4, device=x.device)[:, None] % layer.num_experts
    weight = torch.tensor([[1.0], [0.75], [0.5], [0.25]]).to(x)
    return x, index, weight


def _one_row(layer: MoELayer, x: Tensor, expert: int, weight: Tensor) -> Tensor:
    out = layer.project(expert, layer.activations(expert, x))
    return weight * (out if layer.down_bias is None else out + layer.down_bias[expert])

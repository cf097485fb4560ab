"""One MoE layer below full budget, on the weights as vLLM's CPU kernel holds them: no copy, no second layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ...elastic.compensate.base import Blocks
from ...elastic.scorers.ridge import CEILING
from ...errors import UsageError
from ...kernels.packed_tiles import WIDTH
from ...kernels.selection import mark_above, predicted_norms, slot_values
from .packed_products import PackedGroups, add, dot

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


MEANS = "compensate.mean.vectors"


def unknown_side(side: Mapping[str, Tensor]) -> str | None:
    """What of prism.safetensors changes results below full budget and is not computed here; None if nothing."""
    if "repair" in side:
        return "a repaired W_down"
    kinds = {key.split(".")[1] for key in side if key.startswith("compensate.") and key != MEANS}
    return f"compensation '{kinds.pop()}'" if kinds else None


def pack(rows: Tensor) -> Tensor:
    """[E, rows, d] -> [E, rows / 16, d, 16], the order of vLLM's CPU kernel. rows % 16 == 0."""
    experts, count, depth = rows.shape
    return rows.view(experts, count // WIDTH, WIDTH, depth).transpose(2, 3).contiguous()


class PackedLayer:
    """Selection by the ridge predictor and the threshold rule, execution of the kept sub-experts.

    E experts, d hidden, f neurons, N sub-experts per expert, r gate neurons of each.
    """

    def __init__(self, w13: Tensor, w2: Tensor, activation: str, n_sub: int, gates: int, side: Mapping[str, Tensor]) -> None:
        """w13 [E, 2f, d] and w2 [E, d, f]: packed, float32 or bfloat16. side: `ridge`, `levels`, and the means
        of dropped sub-experts, of prism.safetensors.

        Raises UsageError if the shapes do not fit together.
        """
        self.experts, self.hidden, self.width = w2.shape
        self.n_sub, self.gates = n_sub, gates
        self._check(w13, activation, side)
        self.first = w13.detach().view(self.experts, -1, self.hidden, WIDTH)
        self.down = w2.detach().view(self.experts, -1, self.width, WIDTH)
        self.activate = ACTIVATIONS[activation]
        self.levels = side["levels"].float().contiguous()
        self.means = side[MEANS].float().flatten(0, 1) if MEANS in side else None
        self._predictor(side["ridge"])

    def _check(self, w13: Tensor, activation: str, side: Mapping[str, Tensor]) -> None:
        features = self.hidden + self.n_sub * self.gates + 1
        if activation not in ACTIVATIONS:
            raise UsageError(
                f"experts with the activation '{activation}' run at full budget only", "serve without a quality below 1"
            )
        if w13.shape != (self.experts, 2 * self.width, self.hidden) or self.width % (self.n_sub * WIDTH):
            raise UsageError(
                f"sub-experts of {self.width}/{self.n_sub} neurons do not fit vLLM's CPU kernel, which keeps {WIDTH} together",
                "refactor with fewer sub-experts per expert",
            )
        if w13.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"experts in {w13.dtype} run at full budget only", "use --dtype bfloat16 or float32")
        if "levels" not in side or tuple(side["ridge"].shape) != (self.experts, self.n_sub, features):
            raise UsageError("prism.safetensors does not belong to these weights", "refactor the model again")

    def _predictor(self, ridge: Tensor) -> None:
        """What a score reads, as rows of one packed matrix: the ridge weights of x [N], gate and up rows of the gate neurons [N r]."""
        neurons = (torch.arange(self.n_sub)[:, None] * (self.width // self.n_sub) + torch.arange(self.gates)).flatten()

        def rows(ids: Tensor) -> Tensor:
            return self.first.transpose(2, 3)[:, ids // WIDTH, ids % WIDTH]

        every = torch.cat([ridge[:, :, : self.hidden].to(self.first.dtype), rows(neurons), rows(neurons + self.width)], 1)
        self.predictor = pack(functional.pad(every, (0, 0, 0, -every.shape[1] % WIDTH)))
        self.tail = ridge[:, :, self.hidden :].float().contiguous()
        self.scale = self.down[:, :, neurons].float().square().sum((1, 3)).sqrt()

    def keep(self, x: Tensor, index: Tensor, weight: Tensor, budget: Tensor) -> Tensor:
        """keep [T, k, N] bool. x [T, d] float32, index [T, k] int64, weight [T, k] float32, budget [T] float32."""
        n, features = self.n_sub, self.n_sub * self.gates
        products = torch.zeros(index.numel(), self.predictor.shape[1] * WIDTH)
        groups = PackedGroups.of(index, torch.ones(*index.shape, 1, dtype=torch.bool), self.experts)
        dot(x, groups, self.predictor, 1, groups.choice, products)
        gates = self.activate(products[:, n : n + features]) * products[:, n + features : n + 2 * features]
        norms, values = torch.empty(*index.shape, n), torch.empty(*index.shape, n)
        predicted_norms(
            products.numpy(), gates.numpy(), self.scale.numpy(), self.tail.numpy(), index.numpy(), CEILING, norms.numpy()
        )
        valid = torch.ones(index.shape, dtype=torch.bool).numpy()
        slot_values(weight.numpy(), norms.numpy(), valid, values.numpy())
        keep = torch.empty(values.shape, dtype=torch.bool)
        mark_above(values.numpy(), self.levels.numpy(), budget.numpy(), valid, keep.numpy())
        return keep

    def run(self, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        """[T, d] float32: the sum of the kept sub-experts, and of the means of the others, each times its expert's routing weight.

        Arguments as in `keep`.
        """
        groups, m = PackedGroups.of(index, keep, self.experts), self.width // self.n_sub
        out = torch.zeros(x.shape)
        pre = torch.zeros(len(groups.row), 2 * m)
        dot(x, groups, self.first, 2, groups.slot, pre)
        a = self.activate(pre[:, :m]).mul_(pre[:, m:]).mul_(weight.reshape(-1)[groups.choice, None])
        add(a, groups, self.down, out)
        return out if self.means is None else out.add_(Blocks.of(index, weight, ~keep).combine(self.means))

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, budget: Tensor) -> Tensor:
        """[T, d] in x's dtype. x [T, d], index [T, k] and weight [T, k] of the router, budget [T] in (0, 1]."""
        rows, ids, factors = x.float().contiguous(), index.long().contiguous(), weight.float().contiguous()
        return self.run(rows, ids, factors, self.keep(rows, ids, factors, budget)).to(x.dtype)

"""A trainable experts function, the same through transformers' interface for every family: one sort, one product per expert.

Shapes: T tokens, k experts per token, S chosen pairs of a token and an expert, E experts, d hidden, f neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..architectures.base import FILTER, WEIGHTS, ChosenPairs

NAME = "moe_prism_training"


class Grouped(torch.autograd.Function):
    """x [S, i], each span of rows times its own matrix of w [E, o, i] -> [S, o]; in bfloat16 under autocast, gradients are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
        ctx.types = x.dtype, w.dtype
        if torch.is_autocast_enabled(x.device.type):
            x, w = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (x, w))
        out = x.new_empty(len(x), w.shape[1])
        for e, (low, high) in enumerate(spans):
            torch.mm(x[low:high], w[e].t(), out=out[low:high])
        ctx.save_for_backward(x, w)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,), (x, w) = upstream, ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous()
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        for e, (low, high) in enumerate(ctx.spans):
            torch.mm(dy[low:high], w[e], out=dx[low:high])
            torch.mm(dy[low:high].t(), x[low:high], out=dw[e])
        return dx.to(ctx.types[0]), dw.to(ctx.types[1]), None


def grouped(x: Tensor, w: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """`Grouped` of these."""
    found: Tensor = Grouped.apply(x, w, spans)  # type: ignore[no-untyped-call]
    return found


def trained_experts(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The sum [T, d] of what the chosen experts of x [T, d] give, index and weight [T, k]; an id outside 0 .. E - 1 means none."""
    first, second = (_as_trained(module, name) for name in ("gate_up_proj", "down_proj"))
    flat, experts, k = index.reshape(-1), first.shape[0], index.shape[1]
    there = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = there.argsort(stable=True)
    ends = torch.bincount(there, minlength=experts + 1)[:experts].cumsum(0).tolist()
    order = order[: ends[-1]]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    pairs = ChosenPairs(order // k, order % k, weight.reshape(-1)[order], spans, len(x), k)
    a = module._apply_gate(grouped(x[pairs.token], first, spans))  # type: ignore[operator]
    change = module.__dict__.get(FILTER)
    if change is not None:
        a = change(module, a, pairs)
    y = grouped(a * pairs.weight[:, None].to(a.dtype), second, spans)
    return torch.zeros_like(x).index_add(0, pairs.token, y.to(x.dtype))


def _as_trained(module: nn.Module, name: str) -> Tensor:
    parameter: Tensor = getattr(module, name)
    through = module.__dict__.get(WEIGHTS)
    found: Tensor = parameter if through is None else through(parameter)
    return found


@contextmanager
def training_experts(model: Any) -> Iterator[None]:
    """Inside, the model's experts are computed so that they can be trained."""
    config = model.config
    before = getattr(config, "_experts_implementation", None)
    config._experts_implementation = NAME
    try:
        yield
    finally:
        config._experts_implementation = before


ALL_EXPERTS_FUNCTIONS.register(NAME, trained_experts)

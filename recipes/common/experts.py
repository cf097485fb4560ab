"""A trainable CPU experts function: one sort, one matmul per expert, one compiled activation for all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def swiglu(h: Tensor) -> Tensor:
    """h [S, 2f] = [gate | up] -> [S, f]."""
    gate, up = h.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@torch.compile
def swiglu_forward(h: Tensor, weight: Tensor) -> Tensor:
    return (swiglu(h.float()) * weight[:, None].float()).to(h.dtype)


@torch.compile
def swiglu_backward(h: Tensor, weight: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu(h) * weight` for upstream da [S, f]: dh [S, 2f], dweight [S]."""
    gate, up = h.float().chunk(2, dim=-1)
    sig = torch.sigmoid(gate)
    silu = gate * sig
    da = da.float()
    dweight = (da * silu * up).sum(-1)
    da = da * weight[:, None].float()
    return torch.cat([da * up * (sig + silu * (1 - sig)), da * silu], dim=-1).to(h.dtype), dweight.to(weight.dtype)


class SortedExperts(torch.autograd.Function):
    """The routing weight multiplies the activation, so the weighted sum over experts is a plain index_add.

    The matmuls run in bfloat16 under autocast, else in the dtype of the weights. Gradients have the dtype of what they belong to.
    """

    @staticmethod
    def forward(ctx, x, index, weight, gate_up, down):  # type: ignore[no-untyped-def]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else gate_up.dtype
        order = index.reshape(-1).argsort(stable=True)
        token = order // index.shape[1]
        bounds = torch.bincount(index.reshape(-1), minlength=gate_up.shape[0]).cumsum(0).tolist()
        spans = list(zip([0, *bounds[:-1]], bounds, strict=True))
        first, second = gate_up.to(dtype), down.to(dtype)
        xs, ws = x.to(dtype)[token], weight.reshape(-1)[order]
        h = xs.new_empty(len(order), gate_up.shape[1])
        for e, (lo, hi) in enumerate(spans):
            torch.mm(xs[lo:hi], first[e].t(), out=h[lo:hi])
        a = swiglu_forward(h, ws)
        y = xs.new_empty(len(order), x.shape[1])
        for e, (lo, hi) in enumerate(spans):
            torch.mm(a[lo:hi], second[e].t(), out=y[lo:hi])
        ctx.save_for_backward(xs, h, a, ws, order, token, first, second)
        ctx.spans, ctx.shape, ctx.dtypes = spans, index.shape, (x.dtype, gate_up.dtype)
        return torch.zeros_like(x).index_add_(0, token, y.to(x.dtype))

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        xs, h, a, ws, order, token, gate_up, down = ctx.saved_tensors
        dy = dout.to(xs.dtype)[token]
        da, ddown = torch.empty_like(a), torch.empty_like(down)
        for e, (lo, hi) in enumerate(ctx.spans):
            torch.mm(dy[lo:hi], down[e], out=da[lo:hi])
            torch.mm(dy[lo:hi].t(), a[lo:hi], out=ddown[e])
        dh, dws = swiglu_backward(h, ws, da)
        dxs, dgate_up = torch.empty_like(xs), torch.empty_like(gate_up)
        for e, (lo, hi) in enumerate(ctx.spans):
            torch.mm(dh[lo:hi], gate_up[e], out=dxs[lo:hi])
            torch.mm(dh[lo:hi].t(), xs[lo:hi], out=dgate_up[e])
        dweight = torch.empty_like(ws)
        dweight[order] = dws
        x_dtype, dtype = ctx.dtypes
        dx = torch.zeros_like(dout, dtype=x_dtype).index_add_(0, token, dxs.to(x_dtype))
        return dx, None, dweight.view(ctx.shape), dgate_up.to(dtype), ddown.to(dtype)


@torch.compiler.disable
def sorted_experts(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return SortedExperts.apply(hidden, index, weight, module.gate_up_proj, module.down_proj)  # type: ignore[no-any-return]

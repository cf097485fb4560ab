"""The optimiser of matrices, and how its rate goes over a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
WARM_UP = 0.01
DECAY = 0.45


class Muon:
    """Momentum, then the nearest (semi-)orthogonal matrix by five Newton-Schulz steps (Jordan et al. 2024). 3-D tensors are stacks.

    params: by name; `gate_up` in a name says that two matrices are stored as one. A parameter without a gradient stays as it is.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], momentum: float = 0.95) -> None:
        self.params, self.momentum = dict(params), momentum
        self.buffers = {name: torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        """Move every matrix by lr times its orthogonal update, larger where it has more rows than columns."""
        for name, p in self.params.items():
            if p.grad is None:
                continue
            buffer = self.buffers[name]
            buffer.lerp_(p.grad, 1 - self.momentum)
            g = p.grad.lerp(buffer, self.momentum)
            # a fused gate_up stack is two matrices; orthogonalise each on its own
            parts = g.chunk(2, dim=-2) if "gate_up" in name else (g,)
            for target, part in zip(p.chunk(len(parts), dim=-2) if len(parts) > 1 else (p,), parts, strict=True):
                scale = max(1, part.shape[-2] / part.shape[-1]) ** 0.5
                target.mul_(1 - lr * weight_decay).add_(orthogonal(part), alpha=-lr * scale)


def orthogonal(g: Tensor) -> Tensor:
    """Of matrices [..., o, i]: nearly the orthogonal factor of each, of its own type."""
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()  # exact enough: the polynomial leaves 0.7 to 1.2 anyway
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        a = x @ x.mT
        x = first * x + (second * a + third * a @ a) @ x
    found: Tensor = (x.mT if tall else x).to(g.dtype)
    return found


def learning_rate(progress: float, decay: float = DECAY) -> float:
    """Short warm-up, flat, then linear to zero over the last `decay` of the run: a share of the full rate."""
    falling = (1 - progress) / decay if decay else 1.0
    return min(1.0, progress / WARM_UP + 0.02, falling)

"""A linear router for the parts of a dense layer, fitted and not trained: what does an expert add to this token?"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model import MoELayer
from . import Deal

RIDGE = 0.01  # of the mean diagonal of the Gram matrix
SPREAD = 5e-6
"""The largest distance of a router's score from the mean of its layer's scores. Routing weights are a softmax over all experts, so they
are equal to this, and their order is still that of the scores: float32 tells some hundred of them apart in that span."""


def outputs(layer: MoELayer, deal: Deal, x: Tensor) -> Tensor:
    """[T, E, d]: what each expert adds to rows x [T, d] of a dense layer."""
    a = layer.activations(0, x)
    return torch.stack([a[:, own] @ layer.down[0, :, own].T.to(a.dtype) for own in deal.experts], 1)


def fit_router(x: Tensor, added: Tensor) -> Tensor:
    """[E, d]: ridge regression from x [T, d] to the norms of what experts add [T, E, d], each less the mean over experts.

    Solved in float64; scaled to `SPREAD` on these rows.
    """
    rows, target = x.double(), added.norm(dim=-1).double()
    target = target - target.mean(1, keepdim=True)
    gram = rows.T @ rows
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found = torch.linalg.solve(gram, rows.T @ target).T
    return scaled(found, x)


def scaled(router: Tensor, x: Tensor) -> Tensor:
    """The same order of experts, with scores so close to each other that all routing weights are as good as equal."""
    scores = x.double() @ router.T.double()
    most = (scores - scores.mean(1, keepdim=True)).abs().max().clamp(min=1e-30)
    return (router.double() * (SPREAD / most)).float()


def error(added: Tensor, scores: Tensor, active: int, whole: Tensor) -> float:
    """Squared norm of what experts beyond the `active` best by scores [T, E] would add [T, E, d], over that of the output [T, d]."""
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.topk(active, 1).indices, False)
    missing = (added * dropped[..., None]).sum(1)
    return float(missing.square().sum() / whole.square().sum().clamp(min=1e-30))

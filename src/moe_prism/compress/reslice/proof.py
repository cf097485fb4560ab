"""What a sub-expert's output must be multiplied by: found by running the family's own router with every row N times.

A softmax over all rows gives each of N equal rows an N-th of what one had, and so does dividing by the sum over the chosen. A sigmoid that
nobody divides gives each of them all of it. Which of these a family does, with which factors, biases and groups, is not read off
its name: both routers run on the same inputs, and the sum over the N rows is compared with the one row (`factor_of`).

Shapes: T tokens, E experts, N sub-experts per expert, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checkpoint.convert import place, stored
from ...errors import UsageError
from ...model.router import Router

ROWS, AGREE = 64, 0.9  # tokens, and the share of them that must agree: near ties may fall either way
TOLERANCE = 1e-4
ADVICE = "keep the elastic form, which runs every family"


def repeated(tensor: Tensor, dim: int, n_sub: int) -> Tensor:
    """Every entry along a dimension N times in a row: id e N + n is sub-expert n of expert e."""
    return tensor.repeat_interleave(n_sub, dim)


def fill(source: Router, model: nn.Module, n_sub: int) -> list[tuple[str, Tensor]]:
    """Give the empty block of `model` the weights of the source's, which is loaded, router rows N times. Returns what was there.

    The experts stay empty: they are not run.
    """
    prefix, experts = f"{source.name}.", f"{source.layer.name}."
    rows = {f"{prefix}{row.path}": row.dim for row in source.rows}
    loaded = {name: t.detach() for name, t in stored(source.block)}
    before = []
    for name, tensor in list(stored(model)):
        if name.startswith(prefix) and not name.startswith(experts):
            value = loaded[name.removeprefix(prefix)]
            value = repeated(value, rows[name], n_sub) if name in rows else value
            before.append((name, tensor))
            place(model, name, nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value)
    return before


@torch.no_grad()
def factor_of(source: Router, target: Router, n_sub: int) -> int:
    """What a sub-expert's output is multiplied by so that all N of an expert add up to it: N or 1. Both blocks hold their weights.

    UsageError where the router of N E rows does not choose the N sub-experts of the same k experts, or weighs them unequally.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, source.layer.hidden, generator=generator)
    before, after = source.route(x), target.route(x)
    counts = torch.zeros(ROWS, source.experts, dtype=torch.long).scatter_add_(1, after[0] // n_sub, torch.ones_like(after[0]))
    chosen = torch.zeros_like(counts).scatter_add_(1, before[0], torch.ones_like(before[0]))
    if before[0].shape[1] * n_sub != after[0].shape[1]:
        raise UsageError(f"the router of '{source.layer.name}' takes its number of experts from elsewhere", ADVICE)
    if _disagrees((counts == n_sub * chosen).all(1)):
        raise UsageError(
            f"the router of '{source.layer.name}' would not choose the {n_sub} sub-experts of the experts that it chooses", ADVICE
        )
    wanted = torch.zeros(ROWS, source.experts).scatter_add_(1, before[0], before[1].float())
    found = torch.zeros(ROWS, source.experts * n_sub).scatter_add_(1, after[0], after[1].float())
    for factor in (n_sub, 1):
        off = (found * factor - repeated(wanted, 1, n_sub)).abs().amax(1)
        if not _disagrees(off <= TOLERANCE * wanted.abs().amax(1)):
            return factor
    raise UsageError(f"the router of '{source.layer.name}' weighs sub-experts otherwise than their expert", ADVICE)


def _disagrees(same: Tensor) -> bool:
    return float(same.float().mean()) < AGREE

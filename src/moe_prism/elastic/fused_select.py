"""Selection for few tokens: predictor, values and rule in two compiled calls with the activation of the gate neurons between them.

What it keeps is what scorer and rule keep one after the other, slot by slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import Rule, Scorer, is_compiled
from .rules.top_slots import FEW
from .scorers.ridge import Ridge

if TYPE_CHECKING:
    from ..kernels.selection import Choosing, Held


@cache
def _compiled() -> ModuleType:
    from ..kernels import selection

    return selection


def prepared(scorer: Scorer, rule: Rule, x: Tensor, index: Tensor, weight: Tensor) -> Choosing | None:
    """What the compiled selection wants to know of x [T, d], index, weight [T, k]; None where it does not take them.

    It takes the ridge scorer with the rules that say so (`Rule.compiled`), few choices, float32 on a CPU.
    """
    if rule.compiled is None or not isinstance(scorer, Ridge) or not is_compiled(weight):
        return None
    if not len(rule.compiled) and index.shape[1] * scorer.parts.n_sub > FEW:
        return None
    norms = scorer.terms(x, index)
    if norms is None:
        return None
    found: Choosing = _compiled().Choosing(norms, index.contiguous().numpy(), weight.contiguous().numpy(), rule.compiled)
    return found


def budgets_of(values: Sequence[float | Tensor], tokens: int) -> NDArray[np.float32] | None:
    """[B, T] of budgets that are a number or one per token each; None for tensors that are not [T] on a CPU."""
    if len(values) == 1 and not isinstance(values[0], Tensor):
        return np.full((1, tokens), values[0], np.float32)
    found = np.empty((len(values), tokens), np.float32)
    for row, value in zip(found, values, strict=True):
        if isinstance(value, Tensor):
            if value.numel() != tokens or not value.is_cpu:
                return None
            row[:] = value.reshape(-1).float().numpy()
        else:
            row[:] = value
    return found


def select_few(scorer: Scorer, rule: Rule, x: Tensor, index: Tensor, weight: Tensor, budget: float | Tensor) -> Tensor | None:
    """keep [T, k, N] of few tokens, as rule and scorer choose it; None where they have to do it themselves."""
    budgets = budgets_of([budget], len(x))
    found = None if budgets is None else prepared(scorer, rule, x, index, weight)
    return None if budgets is None or found is None else run(found, None, budgets)


def run(found: Choosing, held: Held | None, budgets: NDArray[np.float32]) -> Tensor:
    """keep [T, k, N] of few tokens at the one row of budgets [1, T]; where they are held, what they reach is written there."""
    shape = (*found.chosen.shape, found.norms.weight.shape[1])
    keeps = np.empty((1, *shape), np.bool_)
    _compiled().select(found, held, budgets, keeps, np.empty(shape, np.float32))
    return torch.from_numpy(keeps[0])

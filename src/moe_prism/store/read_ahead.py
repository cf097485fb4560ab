"""Reading ahead: what the next layer will want, guessed from this layer's input while this layer runs.

The guess is the next layer's own selection on this layer's input: its router (the cross-layer gate of Fate, arXiv 2502.12224, training-
free), then its predictor and rule, so that sub-experts are guessed and not only experts. Shapes: T tokens, E experts, k, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.base import is_compiled
from ..elastic.fused_select import budgets_of, prepared
from ..elastic.runtime import _per_token, experts_per_token
from ..kernels.selection import select
from ..model.scores import router_weight
from ..offload.base import Key

if TYPE_CHECKING:
    from .layer import StoredElastic, StoredLayer

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FEW = 8  # tokens up to which there is something to gain: a long prompt wants nearly everything


class Ahead:
    """Guesses for every layer but the first. width: records to read ahead at most; 0 = never."""

    def __init__(self, elastic: StoredElastic, width: int) -> None:
        self.elastic, self.width = elastic, width
        self.k = experts_per_token(elastic.model, elastic.stored[0].plan.layer)
        layers = [layer.plan.layer for layer in elastic.stored] if width else []
        self.routers = [
            router_weight(elastic.model, layer) if layer.num_experts > 1 else torch.zeros(1, layer.hidden) for layer in layers
        ]

    def __call__(self, number: int, x: Tensor) -> None:
        """Begin to read for layer `number`, from the input x [T, d] of the layer before."""
        if self.width and number < len(self.routers) and len(x) <= FEW:
            self.elastic.store.prefetch(number, self.keys(number, x))

    def keys(self, number: int, x: Tensor) -> Sequence[Key]:
        """The records layer `number` would keep on this input, best first, at most `width`."""
        layer = self.elastic.stored[number]
        setting, misses, space = self.elastic.setting, self.elastic.misses, self.elastic.store.space
        if is_compiled(x):
            arrays = best_experts((x @ self.routers[number].T).numpy(), self.k)
            weight, index = map(torch.from_numpy, arrays)
        else:
            weight, index = (x @ self.routers[number].T).float().softmax(-1).topk(self.k, -1)
        found = self._few(layer, x, index, weight)
        if found is not None:
            return found
        valid = torch.ones_like(index, dtype=torch.bool)
        if (setting.is_full(number) and misses.is_exact) or space.parts == 1:
            values = weight[:, :, None].expand(-1, -1, space.parts)
            keep = torch.ones_like(values, dtype=torch.bool)
        else:
            slots = layer.slots(x, index, weight, valid, setting)
            budget = _per_token(setting.at(number), x).clamp(max=misses.floor)  # what is kept only where it is there is not read
            values, keep = slots.values(), layer.rule(setting.rule).keep(slots, budget)
        first = space.of_layer(number).start
        number_of = first + index[:, :, None] * space.parts + torch.arange(space.parts)
        order = values[keep].argsort(descending=True)
        return list(dict.fromkeys(number_of[keep][order].tolist()))[: self.width]

    def _few(self, layer: StoredLayer, x: Tensor, index: Tensor, weight: Tensor) -> Sequence[Key] | None:
        """The same where selection takes two compiled calls."""
        setting, misses, space = self.elastic.setting, self.elastic.misses, self.elastic.store.space
        number = layer.number
        if space.parts != layer.plan.n_sub or (setting.is_full(number) and misses.is_exact):
            return None
        budgets = budgets_of([setting.at(number)], len(x))
        found = prepared(layer.scorer(setting.scorer), layer.rule(setting.rule), x, index, weight)
        if budgets is None or found is None:
            return None
        np.minimum(budgets, np.float32(misses.floor), out=budgets)
        keys: list[Key] = best_keys(*found, budgets, layer.plan.n_sub, space.of_layer(number).start, self.width).tolist()
        return keys


@njit(nogil=True, cache=True)
def best_experts(logits: Floats, k: int) -> tuple[Floats, Ints]:
    """(weights, ids) [T, k] of the largest softmax probabilities, largest first, equal ones in order."""
    tokens = len(logits)
    weight, index = np.empty((tokens, k), np.float32), np.empty((tokens, k), np.int64)
    for t in range(tokens):
        left = np.exp(logits[t] - logits[t].max())
        left /= left.sum()
        for c in range(k):
            best = np.argmax(left)
            weight[t, c], index[t, c], left[best] = left[best], best, np.float32(-1)
    return weight, index


@njit(nogil=True, cache=True)
def best_keys(
    linear: Floats, gates: Floats, scale: Floats, predictor: Floats, ceiling: float, index: Ints, weight: Floats, levels: Floats,
    budgets: Floats, parts: int, base: int, width: int,
) -> Ints:  # fmt: skip
    """The keys of what `marks.select` keeps, the most valuable first, each once, at most `width`."""
    tokens, k = index.shape
    keeps, values = np.empty((1, tokens, k, parts), np.bool_), np.empty((tokens, k, parts), np.float32)
    select(linear, gates, scale, predictor, ceiling, index, weight, levels, budgets, keeps, values)
    best = np.full(len(predictor) * parts, -1.0, np.float32)
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                if keeps[0, t, c, n]:
                    key = index[t, c] * parts + n
                    best[key] = max(best[key], values[t, c, n])
    found = np.empty(width, np.int64)
    for i in range(width):
        at = np.argmax(best)
        if best[at] < 0:
            return found[:i]
        found[i], best[at] = at + base, np.float32(-1)
    return found

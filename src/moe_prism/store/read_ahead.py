"""Reading ahead: what the next layer will want, guessed from this layer's input while this layer runs.

The guess is the next layer's own selection on this layer's input: its router (the cross-layer gate of Fate, arXiv 2502.12224, training-
free), then its predictor and rule, so that sub-experts are guessed and not only experts. Shapes: T tokens, E experts, k, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.base import is_compiled
from ..elastic.layer import ElasticLayer
from ..elastic.runtime import experts_per_token
from ..kernels.selection import Choosing, select
from ..model.scores import router_weight
from ..offload.base import Key
from .choose_misses import Misses
from .record_store import RecordStore

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

MOST_TOKENS = 8  # up to which there is something to gain: a long prompt wants nearly everything


class ReadAhead:
    """Guesses for every layer but the first. width: records to read ahead at most; 0 = never."""

    def __init__(self, layers: Sequence[ElasticLayer], store: RecordStore, width: int) -> None:
        self.layers, self.store, self.width = layers, store, width
        self.k = experts_per_token(layers[0].elastic.model, layers[0].parts.layer)
        self.routers = [self._router(layer) for layer in layers] if width else []

    @staticmethod
    def _router(layer: ElasticLayer) -> Tensor:
        own = layer.parts.layer
        return router_weight(layer.elastic.model, own) if own.num_experts > 1 else torch.zeros(1, own.hidden)

    def __call__(self, number: int, x: Tensor) -> None:
        """Begin to read for layer `number`, from the input x [T, d] of the layer before.

        Not for routing stages that ask for more than the router's choice: what they ask for is not known yet.
        """
        if self.width and number < len(self.routers) and len(x) <= MOST_TOKENS:
            elastic = self.layers[number].elastic
            if not elastic.step.bound.needs:
                self.store.prefetch(number, self.keys(number, x, elastic.misses))  # type: ignore[attr-defined]

    def keys(self, number: int, x: Tensor, misses: Misses) -> Sequence[Key]:
        """The records layer `number` would keep on this input, best first, at most `width`."""
        layer, space = self.layers[number], self.store.space
        if is_compiled(x):
            arrays = best_experts((x @ self.routers[number].T).numpy(), self.k)
            weight, index = map(torch.from_numpy, arrays)
        else:
            weight, index = (x @ self.routers[number].T).float().softmax(-1).topk(self.k, -1)
        found = layer.candidates(layer.elastic.step, x, index, weight, state={})
        first, whole = space.of_layer(number).start, space.parts == 1
        # what is kept only where it is there is not read: the floor limits the guess
        fused = None if found is None or whole else found.fused([misses.floor])
        if fused is not None and fused[0].norms.weight.shape[1] == space.parts:
            keys: list[Key] = best_keys(fused[0], fused[2][1:], first, self.width).tolist()
            return keys
        if found is None or whole:
            values = weight[:, :, None].expand(-1, -1, space.parts)
            keep = torch.ones_like(values, dtype=torch.bool)
        else:
            index, values, keep = found.index, found.values(), found.keep(misses.floor)
        number_of = first + index[:, :, None] * space.parts + torch.arange(space.parts)
        order = values[keep].argsort(descending=True)
        return list(dict.fromkeys(number_of[keep][order].tolist()))[: self.width]


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
def best_keys(candidates: Choosing, budgets: Floats, base: int, width: int) -> Ints:
    """The keys of what `selection.select` keeps at budgets [1, T], the most valuable first, each once, at most `width`."""
    index, experts, parts = candidates.chosen, len(candidates.norms.weight), candidates.norms.weight.shape[1]
    tokens, k = index.shape
    keeps, values = np.empty((1, tokens, k, parts), np.bool_), np.empty((tokens, k, parts), np.float32)
    select(candidates, None, budgets, keeps, values)
    best = np.full(experts * parts, -1.0, np.float32)
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

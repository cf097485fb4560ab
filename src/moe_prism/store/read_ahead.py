"""Reading ahead: what the next layer will want, guessed from this layer's input while this layer runs.

First experts are guessed: by the next layer's router on this layer's input (the cross-layer gate of Fate, arXiv 2502.12224, training-
free), or by a fitted `Predictor`. Then the next layer's own selection runs on them and this layer's input, so that sub-experts are guessed
and not only experts. Shapes: T tokens, E experts, k, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.base import is_compiled
from ..elastic.layer import ElasticLayer
from ..elastic.runtime import experts_per_token
from ..errors import UsageError
from ..kernels.selection import Choosing, select
from ..model.scores import router_weight
from ..offload.base import Key
from ..offload.predict import Predictor, Seen
from .choose_misses import FEW_TOKENS, Misses
from .record_store import RecordStore
from .token_watch import TokenWatch
from .trial import AheadTrial

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Guess(NamedTuple):
    """width: records to read ahead of a layer at most, 0 = never; predictor: of the experts, None = the layer's own router.

    tried: stop where steps take longer with it (`AheadTrial`). horizon: layers to look ahead: one whose guess is there in whole lets the
    one after it be guessed, by its own router on the same input (HOBBIT, arXiv 2411.01433).
    """

    width: int = 0
    predictor: Predictor | None = None
    tried: bool = False
    horizon: int = 1


class ReadAhead:
    """Guesses for every layer but the first.

    UsageError for a horizon beside a predictor, which knows the experts of the layer before the one it guesses.
    """

    def __init__(self, layers: Sequence[ElasticLayer], store: RecordStore, guess: Guess) -> None:
        if guess.horizon > 1 and guess.predictor is not None:
            raise UsageError(
                "only the predictor gate looks over a layer", "leave --expert-horizon out, or give --expert-predictor gate"
            )
        self.layers, self.store, self.width, self.horizon = layers, store, guess.width, guess.horizon
        self._few = True  # whether the step that runs is of few tokens
        model, own, parts = layers[0].elastic.model, layers[0].parts.layer, store.space.parts
        self.k = experts_per_token(model, own)
        self.guessed = min(store.space.experts, max(self.k, -(-self.width // parts)))  # experts, of every token
        self.routers = [self._router(layer) for layer in layers] if self.width else []
        self.trial = AheadTrial() if guess.tried and self.width else None
        if self.trial is not None:
            store.on_end = self._hear
        self.seen = _SeenLive(model, guess.predictor, self.k, len(layers)) if self.width and guess.predictor is not None else None
        if self.seen is not None and self.seen.predictor.first_layer == 0:
            self.seen.tokens.told = self._first

    @staticmethod
    def _router(layer: ElasticLayer) -> Tensor:
        own = layer.parts.layer
        return router_weight(layer.elastic.model, own) if own.num_experts > 1 else torch.zeros(1, own.hidden)

    def __call__(self, number: int, x: Tensor, index: Tensor) -> None:
        """Begin to read for layer `number`, from the input x [T, d] of the layer before and the experts [T, k'] that it runs.

        Not for routing stages that ask for more than the router's choice: what they ask for is not known yet.
        """
        if number == 1:
            self._few = len(x) <= FEW_TOKENS
        if self.width and number < len(self.routers) and len(x) <= FEW_TOKENS:
            if self.trial is not None and not self.trial.reads:
                return
            if self.seen is not None:
                self.seen.note(number - 1, index, self.store.space.experts)
                if number < self.seen.predictor.first_layer:
                    return
            elastic = self.layers[number].elastic
            if elastic.step.bound.needs:
                return
            for guessed in range(number, min(number + self.horizon, len(self.routers))):
                keys = self.keys(guessed, x, elastic.misses)  # type: ignore[attr-defined]
                missing = any(self.store.places.of[key] < 0 for key in keys)
                self.store.prefetch(guessed, keys)
                if missing:
                    return

    def _hear(self, seconds: float) -> None:
        """A step has ended. Long prompts say nothing: nothing is read ahead of them."""
        assert self.trial is not None
        if self._few:
            self.trial.note(seconds)

    def _first(self, tokens: int) -> None:
        """A step's ids are known, before anything is computed: begin to read for the first layer.

        There is no input yet that its selection could look at, so of the likeliest experts those sub-experts are read that are used most.
        """
        elastic = self.layers[0].elastic
        if tokens > FEW_TOKENS or elastic.step.bound.needs or (self.trial is not None and not self.trial.reads):
            return
        assert self.seen is not None
        scores = self.seen.scores(0, torch.empty(tokens, 0)).max(0)
        likeliest = np.argsort(-scores, kind="stable")[: self.guessed]
        uses = self.store.uses[likeliest].astype(np.float64)  # [guessed, N]
        worth = (uses + 1) / (uses.max() + 1) * np.exp2(-np.arange(len(likeliest)))[:, None]
        keys = likeliest[:, None] * self.store.space.parts + np.arange(self.store.space.parts)
        order = np.argsort(-worth.reshape(-1), kind="stable")[: self.width]
        self.store.prefetch(0, keys.reshape(-1)[order].tolist())

    def experts(self, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, index) [T, guessed] of the experts that layer `number` is guessed to run, likeliest first.

        The weights are its router's, on this input: what the layer's selection weighs its slots by.
        """
        logits = x @ self.routers[number].T
        if self.seen is not None:
            index = torch.from_numpy(self.seen.scores(number, x)).topk(self.guessed, -1).indices
            return logits.float().softmax(-1).gather(1, index), index
        if is_compiled(x):
            weight, index = map(torch.from_numpy, best_experts(logits.numpy(), self.guessed))
            return weight, index
        weight, index = logits.float().softmax(-1).topk(self.guessed, -1)
        return weight, index

    def keys(self, number: int, x: Tensor, misses: Misses) -> Sequence[Key]:
        """The records layer `number` would keep on this input, best first, at most `width`."""
        layer, space = self.layers[number], self.store.space
        weight, index = self.experts(number, x)
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


class _SeenLive:
    """What a predictor may know of the step that runs."""

    def __init__(self, model: Any, predictor: Predictor, k: int, layers: int) -> None:
        self.predictor, self.k = predictor, k
        self.tokens = TokenWatch(model)
        self.ids: list[Ints] = [np.zeros((0, k), np.int64)] * layers

    def note(self, number: int, index: Tensor, experts: int) -> None:
        """Layer `number` runs these experts [T, k']; the first k of them are told."""
        known = index.masked_fill((index < 0) | (index >= experts), -1)[:, : self.k].numpy()
        own = np.full((len(known), self.k), -1, np.int64)
        own[:, : known.shape[1]] = known
        self.ids[number] = own

    def scores(self, number: int, x: Tensor) -> Floats:
        """[T, E] float32. x [T, d]: the input of the layer before; of the first layer there is none."""
        token, past = self.tokens.of(len(x))
        nothing = np.full((len(x), self.k), -1, np.int64)
        known = [own if len(own) == len(x) else nothing for own in self.ids[:number]]
        ids = np.stack(known, axis=1) if known else np.zeros((len(x), 0, self.k), np.int64)
        seen = Seen(token, past, ids, x.float().numpy() if number else None)
        return np.ascontiguousarray(self.predictor.at(number, seen), np.float32)


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

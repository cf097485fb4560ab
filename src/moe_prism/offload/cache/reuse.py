"""Ours: worth = the expected use in the coming steps, a fitted mix of aged counts and of what the layer's input says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..base import Key, KeySpace, Moment
from ..predict.reuse import DECAY, ReusePredictor, coming
from ..replay import uses_by_step
from ..trace import Trace
from .ranked import Aged, Ranked
from .ranking import BY_LOGS, Ranking

HALF_LIVES = (8.0, 32.0, 512.0)  # steps
FLOOR = 0.05  # of a count, so that its logarithm exists
RIDGE = 1.0


class Reuse(Ranked):
    """worth = c0 log n8 + c1 log n32 + c2 log n512 + c3 s, coefficients per layer by least squares on a calibration trace.

    n_h is the count of a key's requests with half-life h steps, s the last hint for its expert: `predict/reuse.py` reads the layer's
    input with one matrix and says how much every expert will be used, decaying by 0.7 per step. Without hints s is 0 and the counts decide.
    """

    def __init__(self, *args: object, coefficients: Sequence[Sequence[float]] = (), **settings: object) -> None:
        """coefficients [L][4]; empty = the mean of the three counts."""
        super().__init__(*args, **settings)
        self._coefficients = [tuple(c) for c in coefficients] or [(1.0, 1.0, 1.0, 1.0)] * self.space.layers
        self._counts = [Aged(h) for h in HALF_LIVES]
        self._hints: dict[int, Sequence[float]] = {}

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace, slots: int) -> dict[str, Any]:
        if trace.inputs is None:
            return {"coefficients": coefficients(trace, space, None).tolist()}
        hints = ReusePredictor.fit(trace, space).scores(trace)
        return {"coefficients": coefficients(trace, space, hints).tolist()}

    @classmethod
    def shapes(cls, space: KeySpace) -> dict[str, tuple[int, ...]]:
        return {"coefficients": (space.layers, 4)}

    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:
        self._hints[layer] = scores

    def count(self, key: Key, weight: float, now: Moment) -> None:
        for each in self._counts:
            each.add(key, now.step)

    def worth(self, key: Key, now: Moment) -> float:
        """The expected use of a resident key in the coming steps."""
        layer = self.space.layer(key)
        c = self._coefficients[layer]
        scores = self._hints.get(layer)
        value = c[3] * scores[self.space.expert(key)] if scores is not None else 0.0
        return value + sum(w * each.log2(key, now.step, FLOOR) for w, each in zip(c, self._counts, strict=False))

    def ranking(self) -> Ranking | None:
        """Without hints."""
        numbers = np.array([own[:3] for own in self._coefficients], np.float64)
        return Ranking(BY_LOGS, HALF_LIVES, numbers, FLOOR)


def coefficients(trace: Trace, space: KeySpace, hints: np.ndarray | None) -> np.ndarray:
    """[L, 4]: least squares of the coming use on the features of `worth`, every key of a layer alike; hints [T, L, E]."""
    out = np.zeros((space.layers, 4))
    for layer in range(space.layers):
        used, rows = uses_by_step(trace, space, layer)
        columns = [np.log2(aged(used, h) + FLOOR) for h in HALF_LIVES]
        if hints is not None:
            columns.append(np.repeat(hints[rows, layer], space.parts, axis=1))
        x = np.stack([*columns, np.ones_like(columns[0])], -1).reshape(-1, len(columns) + 1)
        gram = x.T @ x + RIDGE * np.eye(x.shape[1])
        fitted = np.linalg.solve(gram, x.T @ coming(used, DECAY).reshape(-1))
        out[layer, : len(columns)] = fitted[:-1]
    return out


def aged(used: np.ndarray, half_life: float) -> np.ndarray:
    """[S, n] counts after every step of used [S, n], a step weighing 2^(-1/half_life) of the next."""
    out, total, factor = np.zeros(used.shape), np.zeros(used.shape[1]), 2.0 ** (-1 / half_life)
    for step, row in enumerate(used):
        total = total * factor + row
        out[step] = total
    return out

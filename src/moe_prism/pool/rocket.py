"""Rocket, open knowledge for a task (arXiv 2408.15915): a few models or adapters that are good, consistent and unlike each other.

The paper looks at K shots of a task: how many an expert gets right, how sure it is of the right reasoning, and how much it is like the
others. The weights between the three are not public. Ours: the objective is facility location over the shots, in which an option serves a
shot by its merit there, so a second option of the same strengths adds nothing. Greedy choice then has at least 1 - 1/e of the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .base import Chooser, Floats, ModelOption, Record, SubsetLimits, recorded, within
from .gate import Gate
from .text import embed, embed_all

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 4


@dataclass(frozen=True)
class RocketParameters:
    """size: options that are kept. consistency: weight of an option's support of the known answers beside its quality, 0 to 1.

    ridge: weight of the penalty on the gate's coefficients. None: of a few, the one that picks best for recorded questions left out.
    """

    size: int = 3
    consistency: float = 0.5
    ridge: float | None = None


class Rocket(Chooser):
    """Selected options, and a gate over them by the text of the question."""

    Parameters = RocketParameters

    def __init__(self, used: Sequence[int], gate: Gate) -> None:
        """gate: over `used`, in this order."""
        self.used, self.gate = list(used), gate

    @classmethod
    def fit(cls, options: Sequence[ModelOption], record: Record | None, limits: SubsetLimits, settings: Any) -> Rocket:
        record = recorded(record, "rocket")
        record.check(len(options))
        allowed = within(options, record, limits)
        worth = merit(record, settings.consistency)
        used = sorted(allowed[i] for i in greedy(worth[:, allowed], settings.size))
        features, mine = embed_all(record.texts), worth[:, used]
        ridge = best_ridge(features, mine) if settings.ridge is None else settings.ridge
        return cls(used, Gate.fit(features, _likely(mine), ridge))

    def chosen(self) -> list[int]:
        return list(self.used)

    def order(self, text: str, allowed: Sequence[int]) -> list[int]:
        share = dict(zip(self.used, self.gate.weights(embed(text)[None])[0], strict=True))
        return sorted((o for o in self.used if o in allowed), key=lambda o: (-share[o], o))


def _likely(worth: Floats) -> Floats:
    """Merit as a gate takes it: the log of a probability."""
    return np.asarray(np.log(np.clip(worth, 1e-6, None)))


def best_ridge(features: Floats, worth: Floats) -> float:
    """Of `RIDGES` the one whose gate picks the most merit for the questions of a fold that it was not fitted on; the largest of equals."""
    folds = np.arange(len(worth)) % min(FOLDS, len(worth))
    found: list[tuple[float, float]] = []
    for ridge in RIDGES if len(worth) > 1 else RIDGES[-1:]:
        picked = 0.0
        for fold in sorted({*folds.tolist()} if len(worth) > 1 else ()):
            out = folds == fold
            gate = Gate.fit(features[~out], _likely(worth[~out]), ridge)
            picked += float(worth[out, :][np.arange(out.sum()), gate.weights(features[out]).argmax(1)].sum())
        found.append((picked, ridge))
    return max(found)[1]


def merit(record: Record, consistency: float) -> Floats:
    """[Q, O], 0..1: quality, with the support of the known answer beside it where the record has one."""
    if record.support is None:
        return record.quality
    return np.asarray((1 - consistency) * record.quality + consistency * record.support)


def objective(worth: Floats, chosen: Sequence[int]) -> float:
    """Facility location: the mean over shots of the best merit among the chosen. worth: [Q, O]."""
    return float(worth[:, list(chosen)].max(1).mean()) if len(chosen) else 0.0


def greedy(worth: Floats, size: int) -> list[int]:
    """`size` options, each the one that adds most to the objective; the smaller number where two add as much."""
    best, found = np.zeros(len(worth)), list[int]()
    for _ in range(min(size, worth.shape[1])):
        gains = np.maximum(worth, best[:, None]).mean(0)
        gains[found] = -np.inf
        found.append(int(gains.argmax()))
        best = np.maximum(best, worth[:, found[-1]])
    return found


def brute_force(worth: Floats, size: int) -> list[int]:
    """The best of all subsets of that size."""
    every = combinations(range(worth.shape[1]), min(size, worth.shape[1]))
    best: tuple[int, ...] = max(every, key=lambda chosen: objective(worth, tuple(chosen)))
    return list(best)


def select(score: Floats, similarity: Floats, size: int) -> list[int]:
    """The same from scores [O], 0..1, and similarities [O, O], 0..1: every option is served by the chosen one that is most like it.

    An option's merit at another is its own score times their similarity, so score and diversity are one objective, and it is submodular.
    """
    return greedy(np.asarray(similarity) * np.asarray(score)[None, :], size)

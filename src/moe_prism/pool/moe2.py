"""MoE² (arXiv 2501.09410): a subset of language models under limits on time and energy, then a gate that picks one for each question.

The gate is fitted once, on all options: a ridge regression per option predicts its quality from the text. A subset uses the same
regressions and takes the largest, so nothing is fitted again for it. The paper proves that of its own gate; here it holds because an
option's regression does not see the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Chooser, Floats, ModelOption, Record, SubsetLimits, recorded, within
from .subset import select
from .text import embed, embed_all

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True)
class GateParameters:
    """ridge: weight of the penalty on the gate's coefficients; a larger one trusts the text of a question less. None: leaving each recorded
    question out says which of a few picks the best options.
    """

    ridge: float | None = None


class MoE2(Chooser):
    """Subset, then gate."""

    Parameters = GateParameters

    def __init__(self, used: Sequence[int], weights: Floats, mean: Floats) -> None:
        """weights: [F, O]; mean: [O] quality over all recorded questions."""
        self.used, self.weights, self.mean = sorted(used), weights, mean

    @classmethod
    def fit(cls, options: Sequence[ModelOption], record: Record | None, limits: SubsetLimits, settings: Any) -> MoE2:
        record = recorded(record, "moe2")
        record.check(len(options))
        within(options, record, limits)
        models = list(dict.fromkeys(option.model for option in options))
        owners = [models.index(option.model) for option in options]
        found = select(record.quality, record.seconds.mean(0), record.energy, limits, owners)
        return cls(found.chosen, *fit_gate(record, settings.ridge))

    def chosen(self) -> list[int]:
        return list(self.used)

    def expected(self, text: str) -> Floats:
        """[O] predicted quality of every option."""
        return np.asarray(self.mean + embed(text) @ self.weights)

    def order(self, text: str, allowed: Sequence[int]) -> list[int]:
        said = self.expected(text)
        return sorted((o for o in self.used if o in allowed), key=lambda o: (-said[o], o))


def fit_gate(record: Record, ridge: float | None) -> tuple[Floats, Floats]:
    """(weights [F, O], mean [O]): ridge regression of every option's quality on the texts, each by itself, with one ridge for all."""
    mean = record.quality.mean(0)
    features = embed_all(record.texts)
    gram = features @ features.T  # fewer questions than features
    chosen = best_ridge(gram, record.quality) if ridge is None else ridge
    shares = np.linalg.solve(gram + chosen * np.eye(len(gram)), record.quality - mean)
    return np.asarray(features.T @ shares), np.asarray(mean)


def best_ridge(gram: Floats, quality: Floats) -> float:
    """Of `RIDGES` the one whose gate picks the best options for questions that it was not fitted on; the largest of equal ones.

    Each question is left out once. For a ridge regression that has a closed form: what is left of it, over 1 less its leverage.
    """
    mean, every = quality.mean(0), np.arange(len(quality))
    found: list[tuple[float, float]] = []
    for ridge in RIDGES:
        smoother = gram @ np.linalg.inv(gram + ridge * np.eye(len(gram)))
        said = smoother @ (quality - mean)
        left = quality - mean - (quality - mean - said) / (1 - np.diag(smoother))[:, None]
        found.append((float(quality[every, (mean + left).argmax(1)].mean()), ridge))
    return max(found)[1]

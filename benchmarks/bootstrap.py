"""How sure a mean over windows is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000


def interval(values: NDArray[np.float64]) -> list[float]:
    """[low, high]: 95 % of the means of as many values drawn with replacement. Deterministic."""
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return [float(v) for v in np.quantile(values[drawn].mean(1), (0.025, 0.975))]


def mean_interval(values: NDArray[np.float64]) -> list[float]:
    """[mean, low, high], to four digits."""
    return [round(float(v), 4) for v in (values.mean(), *interval(values))]

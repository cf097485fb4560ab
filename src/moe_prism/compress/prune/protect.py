"""Experts that no method may remove, quantize or merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Protection = Callable[[Sequence[Mapping[str, Mapping[str, Tensor]]]], list[Tensor]]
"""Statistics of all layers (collector -> statistic -> tensor) -> [E] (bool) per layer: what has to stay."""

QUANTILE = 0.995
SHARE = 0.1  # of the largest output of all
CLEAR = 20.0  # largest over median output, below which there is no outlier at all


def super_experts(values: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> list[Tensor]:
    """[E] (bool) per layer: Super Experts (arXiv 2507.23279), from the collector `outputs` of all layers.

    An expert is one if the largest |o| over tokens and channels is above the 99.5th percentile of all experts and at least a tenth of the
    largest, in a layer where massive activations are formed: up to the first whose hidden state reaches half of its maximum over layers
    (the paper does not define these; where the residual stream was not seen, layers below three quarters of the depth, as its code).
    None at all unless the largest is 20 times the median: both thresholds alone always return someone.
    """
    peaks = [layer["outputs"]["max"].double() for layer in values]
    every = torch.cat(peaks)
    none = [torch.zeros(len(p), dtype=torch.bool) for p in peaks]
    if float(every.max()) < CLEAR * float(every.median()):
        return none
    limit = max(float(every.quantile(QUANTILE)), 0.0)
    last = _forming(values)
    found = [(p > limit) & (p >= SHARE * every.max()) for p in peaks]
    return [mask if i <= last else empty for i, (mask, empty) in enumerate(zip(found, none, strict=True))]


def _forming(values: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> int:
    """The last layer in which massive activations can be formed."""
    hidden = [float(layer["outputs"]["hidden_max"]) for layer in values]
    if not all(int(layer["outputs"]["residual_tokens"]) for layer in values):
        return round(0.75 * len(values)) - 1
    return next(i for i, h in enumerate(hidden) if h >= max(hidden) / 2)

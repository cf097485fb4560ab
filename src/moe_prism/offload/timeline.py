"""What reads cost a step: how long its layers wait for records that are read ahead, and for those that are read when they are missed."""

from __future__ import annotations

from collections.abc import Sequence


def stall(layer: float, ahead: float, missing: float, busy: float = 0.0) -> float:
    """Time that passes between two layers' computations.

    layer: what the layer before computed, during which its records were read ahead; ahead, missing: what it takes to read what was
    guessed for the layer, and what it then still misses. One link carries both, what was guessed first, and is never interrupted.
    busy: of `ahead`, what the computing thread does itself to begin and to check the reads. That hides behind nothing.
    """
    return busy + max(0.0, ahead - busy - layer) + missing


def step_time(layer: float, ahead: Sequence[float], missing: Sequence[float], busy: Sequence[float] | None = None) -> float:
    """Time of a step whose layers compute for `layer` each. ahead, missing, busy: see `stall`, per layer.

    Nothing computes before the first layer, so what is read ahead for it is waited for.
    """
    own = (0.0, *[layer] * (len(missing) - 1))
    return len(missing) * layer + sum(map(stall, own, ahead, missing, busy or [0.0] * len(missing)))

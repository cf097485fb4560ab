"""Seconds of a decoding step, from what it must read and compute: a roofline of three parts, and what costs time whatever is read.

    t = max(U w / BW, F_e / P) + max(R / BW, F_r / P) + max(C / BW, F_a / P) + F_p / P + fixed + token B

U w: bytes of the distinct experts that the B tokens of the step choose (`distinct.py`), F_e their FLOPs; R, F_r: all other weights
(attention, shared experts, dense layers, routers, head), read once per step; C, F_a: cached keys and values; F_p: prompt tokens that
the same device computes meanwhile. BW, P, fixed and token are the machine's, `fit` from measured steps; the rest is the model's shape.

Bandwidth and peak are what the software reaches, not the data sheet's. Steps that are never bound by one of them leave it undetermined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .distinct import Shares, distinct

HUGE = 1e21  # FLOP/s or bytes/s of a limit that no measured step met


@dataclass(frozen=True)
class ExpertLayer:
    """E experts, k per token, weights of one."""

    experts: int
    chosen: int
    weights: int


@dataclass(frozen=True)
class Shape:
    """What a step reads and computes, in numbers; bytes follow from the widths at the end."""

    layers: tuple[ExpertLayer, ...]
    rest: int  # weights read in every step beside the experts; of the input embedding only a row per token is, it does not count
    cached: int  # numbers kept per token of context, over all layers
    attend: int  # FLOPs per pair of a token and an earlier one, over all layers
    bytes_per_weight: float = 2.0
    bytes_per_cached: float = 2.0


@dataclass(frozen=True)
class StepLoad:
    """batch: requests that generate a token per step; context: their mean length; prompt: prompt tokens computed per generated token."""

    batch: float
    context: float = 0.0
    prompt: float = 0.0


@dataclass(frozen=True)
class Read:
    """shares[l] [M]: the share of tokens that read each of M equal pieces of layer l; size: weights of a piece / weights of an expert.

    M = E and size 1 for whole experts (fewer once pruned), E N and 1/N for sub-experts.
    """

    shares: tuple[Shares, ...]
    size: float = 1.0


Reads = tuple[Read, ...]
"""What tokens read of the expert layers: experts or sub-experts, and the predictors that choose these."""


@dataclass(frozen=True)
class Terms:
    """Bytes and FLOPs of the three parts of a step, FLOPs of the prompts beside it, and its tokens."""

    expert_bytes: float
    expert_flops: float
    rest_bytes: float
    rest_flops: float
    cache_bytes: float
    cache_flops: float
    prompt_flops: float
    batch: float


def terms(shape: Shape, choice: Reads, load: StepLoad) -> Terms:
    """What a step at this load reads and computes."""
    read = per_token = 0.0
    for part in choice:
        if len(part.shares) != len(shape.layers):
            raise UsageError(
                f"routing of {len(part.shares)} layers for a model of {len(shape.layers)}", "measure this model's routing"
            )
        for layer, shares in zip(shape.layers, part.shares, strict=True):
            read += layer.weights * part.size * float(distinct(shares, load.batch))
            per_token += layer.weights * part.size * float(shares.sum())
    b, context = load.batch, load.context
    prompt = load.prompt * (2 * (per_token + shape.rest) + shape.attend * context / 2)
    return Terms(
        expert_bytes=shape.bytes_per_weight * read,
        expert_flops=2 * b * per_token,
        rest_bytes=shape.bytes_per_weight * shape.rest,
        rest_flops=2 * b * shape.rest,
        cache_bytes=b * context * shape.cached * shape.bytes_per_cached,
        cache_flops=b * context * shape.attend,
        prompt_flops=b * prompt,
        batch=b,
    )


@dataclass(frozen=True)
class Machine:
    """bandwidth in bytes/s, peak in FLOP/s, fixed in seconds per step, token in seconds per token of a step."""

    bandwidth: float
    peak: float
    fixed: float = 0.0
    token: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.peak > 0 and self.fixed >= 0 and self.token >= 0):
            raise UsageError(
                f"a machine of {self.bandwidth:g} bytes/s, {self.peak:g} FLOP/s, {self.fixed:g} s and {self.token:g} s is impossible",
                "bandwidth and peak must be above 0, times at least 0",
            )

    def seconds(self, t: Terms) -> float:
        """Predicted time of one step, prompts included."""
        return sum(self.parts(t).values())

    def parts(self, t: Terms) -> dict[str, float]:
        """The same by what it is spent on."""
        return {
            "experts": max(t.expert_bytes / self.bandwidth, t.expert_flops / self.peak),
            "rest": max(t.rest_bytes / self.bandwidth, t.rest_flops / self.peak),
            "cache": max(t.cache_bytes / self.bandwidth, t.cache_flops / self.peak),
            "prompts": t.prompt_flops / self.peak,
            "fixed": self.fixed,
            "tokens": self.token * t.batch,
        }

    def is_reading(self, t: Terms) -> bool:
        """Whether the experts' time is that of reading them, so that fewer distinct experts save time."""
        return t.expert_bytes / self.bandwidth >= t.expert_flops / self.peak


@dataclass(frozen=True)
class Fit:
    """A machine, the relative errors of its predictions on the steps it was fitted to, and the limits that none of them met."""

    machine: Machine
    median: float
    worst: float
    unmet: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.machine), "median_error": self.median, "worst_error": self.worst, "unmet_limits": list(self.unmet)}


def fit(steps: Sequence[tuple[Terms, float]], *, per_token: bool = True) -> Fit:
    """The machine that predicts (terms, seconds) best: robust least squares on the logarithm, from several starts.

    per_token False: no cost per token beside bytes and FLOPs. UsageError for fewer steps than parameters or a time that is not positive.
    """
    count = 4 if per_token else 3
    if len(steps) < count or any(not 0 < s < math.inf for _, s in steps):
        raise UsageError(f"{len(steps)} measured steps do not determine {count} numbers of a machine", "measure more steps")
    rows = np.array([astuple(t) for t, _ in steps]).T
    seconds = np.array([s for _, s in steps])
    found = [_solve(rows, seconds, start) for start in _starts(rows, seconds, count)]
    best = min(found, key=lambda item: item[0])[1]
    machine = Machine(*(float(v) for v in best))
    off = np.abs(_seconds(rows, best) / seconds - 1)
    return Fit(machine, float(np.median(off)), float(off.max()), _unmet(machine, [t for t, _ in steps]))


def _seconds(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`Machine.seconds` of many steps at once; rows are the fields of Terms."""
    bandwidth, peak, fixed = values[:3]
    token = values[3] if len(values) > 3 else 0.0
    parts = [np.maximum(rows[i] / bandwidth, rows[i + 1] / peak) for i in (0, 2, 4)]
    return parts[0] + parts[1] + parts[2] + rows[6] / peak + fixed + token * rows[7]  # type: ignore[no-any-return]


def _starts(rows: NDArray[np.float64], seconds: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """Machines that spend a small or a large part of the longest step on reading, and likewise on computing."""
    size, flops = rows[0] + rows[2] + rows[4], rows[1] + rows[3] + rows[5] + rows[6]
    longest, tokens = float(seconds.max()), float(rows[7].max())
    starts = [
        [float(size.max()) / longest / a, float(flops.max()) / longest / b, float(seconds.min()) * 0.7, 0.1 * longest / tokens]
        for a in (0.1, 0.5, 1.0)
        for b in (0.1, 0.5, 1.0)
    ]
    return [np.log(np.maximum(start[:count], 1e-12)) for start in starts]


def _solve(
    rows: NDArray[np.float64], seconds: NDArray[np.float64], start: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """(cost, parameters) of the nearest optimum; parameters in logarithms, so that none gets negative."""
    from scipy.optimize import least_squares  # slow to import, and only fitting needs it

    log = np.log(seconds)
    bounds = ([-30.0] * len(start), [math.log(HUGE)] * len(start))
    done = least_squares(lambda x: np.log(_seconds(rows, np.exp(x))) - log, start, bounds=bounds, loss="soft_l1", f_scale=0.1)
    return float(done.cost), np.exp(done.x)


def _unmet(machine: Machine, steps: Sequence[Terms]) -> tuple[str, ...]:
    """The limits of a machine that bind nothing worth a hundredth of any step: their numbers mean nothing."""

    def met(sizes: Sequence[float], limit: float, others: Sequence[float], other: float, whole: float) -> bool:
        return any(s / limit >= max(o / other, 0.01 * whole) for s, o in zip(sizes, others, strict=True))

    bandwidth = peak = False
    for t in steps:
        whole = machine.seconds(t)
        size, flops = (t.expert_bytes, t.rest_bytes, t.cache_bytes), (t.expert_flops, t.rest_flops, t.cache_flops)
        bandwidth = bandwidth or met(size, machine.bandwidth, flops, machine.peak, whole)
        peak = peak or met(flops, machine.peak, size, machine.bandwidth, whole) or t.prompt_flops / machine.peak > 0.01 * whole
    return tuple(name for name, was in (("bandwidth", bandwidth), ("peak", peak)) if not was)

"""SRP and SCH: how steady a model's routing is over a segment, which is what a cache lives on ("Not All Models Suit Expert
Offloading", arXiv 2505.16056). Shapes: T tokens, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UsageError
from .cache.belady import Belady
from .cache.lfu import LFU
from .cache.lru import LRU
from .cache.sch import SCH
from .predict.base import chosen
from .replay import ReplayOptions, groups, replay
from .trace import Array, Trace

SEGMENTS = (4, 16, 64)


@dataclass(frozen=True)
class Steadiness:
    """score = F1 of the best segment router; size = active experts it needs, relative to the model's; threshold = its level a*."""

    score: float
    size: float
    threshold: int


def srp(trace: Trace, m: int) -> Steadiness:
    """Segment routing best performance: a router that sets each expert on or off for m tokens at a time, one threshold for all.

    With f = tokens of a segment (any start within a request) that use an expert, "on where f >= a" matches M = sum of f there,
    predicts P = m x such segments, and A = sum of all f: score = max over a of 2 M / (P + A).
    """
    counts = np.zeros(m + 1, np.int64)
    for request in np.unique(trace.request):
        part = trace.rows(trace.request == request)
        for layer in range(part.layers):
            counts += np.bincount(windowed(chosen(part, layer), m).ravel(), minlength=m + 1)
    return best_threshold(counts, m)


def windowed(used: Array, m: int) -> Array:
    """f [T - m + 1, E] of used [T, E]: uses in the m tokens from each start; nothing for a shorter sequence."""
    if m < 1:
        raise UsageError(f"segments of {m} tokens are impossible", "give at least 1")
    total = np.r_[np.zeros((1, used.shape[1]), np.int64), np.cumsum(used.astype(np.int64), axis=0)]
    return total[m:] - total[:-m] if len(used) >= m else np.zeros((0, used.shape[1]), np.int64)


def best_threshold(counts: Array, m: int) -> Steadiness:
    """counts [m + 1]: (segment, expert) pairs by f."""
    f = np.arange(m + 1)
    matched = np.cumsum((f * counts)[::-1])[::-1]  # with f >= a
    predicted = m * np.cumsum(counts[::-1])[::-1]
    if matched[0] == 0:
        return Steadiness(0.0, 0.0, m)
    scores = 2 * matched / np.maximum(predicted + matched[0], 1)
    scores[0] = -1.0  # a = 0 would predict what nobody uses
    best = int(scores.argmax())
    return Steadiness(float(scores[best]), float(predicted[best] / matched[0]), best)


def sch(trace: Trace, m: int, rho: float = 2.0) -> float:
    """Segment cache best hit rate: rho x k slots per layer, evicting what the next m tokens use least."""
    return replay(trace, SCH, max(trace.k, round(rho * trace.k)), ReplayOptions(settings={"m": m})).hit_rate


def routing_report(trace: Trace) -> dict[str, Any]:
    """SRP and SCH of a trace's decode rows, and the hit rates they are there to foretell, at 1, 2 and 3 k slots per layer."""
    rows = replace(
        trace.decode() if (trace.phase == 1).any() else trace, kept=None
    )  # of what routers chose, whatever was computed
    work = list(groups(rows, rows.space))
    rates = []
    for rho in (1, 2, 3):
        slots = min(rho * rows.k, rows.experts)
        found = {
            "lru": replay(rows, LRU, slots, ReplayOptions(order=work)),
            "lfu": replay(rows, LFU, slots, ReplayOptions(order=work)),
            **{f"sch({m})": replay(rows, SCH, slots, ReplayOptions(order=work, settings={"m": m})) for m in SEGMENTS},
            "belady": replay(rows, Belady, slots, ReplayOptions(order=work)),
        }
        rates.append({"slots": slots, **{name: counts.hit_rate for name, counts in found.items()}})
    return {
        "tokens": len(rows),
        "k": rows.k,
        "experts": rows.experts,
        "srp": [{"m": m, **vars(srp(rows, m))} for m in SEGMENTS],
        "hit_rates": rates,
        "load": [_load(rows, layer) for layer in range(rows.layers)],
    }


def _load(trace: Trace, layer: int) -> dict[str, float]:
    """How evenly a layer's experts are used: entropy relative to even use, and the busiest expert's share."""
    share = chosen(trace, layer).sum(0)
    share = share / max(share.sum(), 1)
    used = share[share > 0]
    return {
        "entropy": float(-(used * np.log(used)).sum() / np.log(len(share))) if len(share) > 1 else 1.0,
        "busiest": float(share.max()),
    }

"""Was more offered than the server can do? Then queues grow for as long as the run lasts, and its latencies are those of its length.

The run is cut into blocks of equal time. It is saturated if both the requests in flight and the time to first token rise from block to
block (Kendall's tau, one-sided, 0.2 %) and end at least 1.5 times as high as they began. Blocks instead of single requests,
because successive requests meet the same queue and a test that takes them as independent sees slopes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np

from .measures import Window
from .outcome import Outcome

BLOCKS = 10
RISING = 0.7  # tau of ten values that chance reaches with 0.2 %
GROWTH = 1.5


def saturated(outcomes: Sequence[Outcome], window: Window) -> bool:
    """True if requests in flight and TTFT both grow over the window. False if a block has no request."""
    edges = np.linspace(window.start, window.end, BLOCKS + 1)
    waits: list[float] = []
    flights: list[float] = []
    for start, end in pairwise(edges):
        block = Window(float(start), float(end))
        due = block.due(outcomes)
        if not due:
            return False
        waits.append(float(np.mean([_wait(o, window.end) for o in due])))
        flights.append(in_flight(outcomes, block))
    return grows(waits) and grows(flights)


def in_flight(outcomes: Sequence[Outcome], block: Window) -> float:
    """Mean number of requests that were sent and not ended."""
    held = 0.0
    for o in outcomes:
        if o.sent is not None:
            end = block.end if o.end is None else o.end
            held += max(0.0, min(end, block.end) - max(o.sent, block.start))
    return held / block.seconds


def grows(values: Sequence[float]) -> bool:
    """Rises steadily, and by half."""
    signs = [np.sign(b - a) for a, b in combinations(values, 2)]
    third = max(1, len(values) // 3)
    first, last = float(np.mean(values[:third])), float(np.mean(values[-third:]))
    return float(np.mean(signs)) >= RISING and last >= GROWTH * first


def _wait(outcome: Outcome, end: float) -> float:
    """Time to first token; of a request that got none, how long it has waited at least."""
    return outcome.ttft if outcome.ttft is not None else max(0.0, end - outcome.job.arrival)

"""Look-ahead batching (Read-ME, arXiv 2410.19123, section 5): requests that want the same experts go together.

`orders.py` measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from moe_prism.errors import UsageError


def fill_batches(wanted: Sequence[Collection[int]], limit: int, *, window: int = 64, patience: int = 8) -> list[list[int]]:
    """Batches of at most `limit` waiting requests, by index into `wanted`, the experts that each is known to need.

    A batch is filled with the waiting request that adds the fewest experts to it, of equal ones the one whose expert most of the
    waiting want, then the oldest. Where each request wants one expert this is the paper's rule: fill from the longest queue, then from
    the next. A request that `patience` batches passed over opens the next one, which the paper lacks. window: how many requests wait
    at a time (they arrive in order).
    """
    if limit < 1 or window < limit or patience < 1:
        raise UsageError(
            f"limit {limit}, window {window}, patience {patience} do not fit", "give 1 <= limit <= window, patience >= 1"
        )
    waiting: list[int] = []
    age: dict[int, int] = {}
    arrived, batches = 0, []
    while arrived < len(wanted) or waiting:
        while arrived < len(wanted) and len(waiting) < window:
            waiting.append(arrived)
            age[arrived] = 0
            arrived += 1
        batch = [waiting[0]] if age[waiting[0]] >= patience else []
        _fill(batch, waiting, wanted, limit)
        batches.append(batch)
        waiting = [r for r in waiting if r not in set(batch)]
        for request in waiting:
            age[request] += 1
    return batches


def _fill(batch: list[int], waiting: Sequence[int], wanted: Sequence[Collection[int]], limit: int) -> None:
    queues = Counter(e for r in waiting for e in wanted[r])
    popular = {r: max((queues[e] for e in wanted[r]), default=0) for r in waiting}
    active = {e for r in batch for e in wanted[r]}
    left = [r for r in waiting if r not in batch]
    while left and len(batch) < limit:
        request = min(left, key=lambda r: (len(set(wanted[r]) - active), -popular[r], r))
        batch.append(request)
        left.remove(request)
        active |= set(wanted[request])


def distinct(batches: Sequence[Sequence[int]], wanted: Sequence[Collection[int]]) -> float:
    """Mean number of distinct experts per batch."""
    return sum(len({e for r in batch for e in wanted[r]}) for batch in batches) / max(1, len(batches))


def longest_wait(batches: Sequence[Sequence[int]]) -> int:
    """How many batches later than in order of arrival the unluckiest request was served."""
    limit = max(map(len, batches), default=1)
    return max((number - request // limit for number, batch in enumerate(batches) for request in batch), default=0)

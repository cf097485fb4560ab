"""Look-ahead batching (Read-ME, arXiv 2410.19123, section 5): requests that want the same experts go together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import UsageError


def fill_batches(wanted: Sequence[Collection[int]], limit: int, *, window: int = 64, patience: int = 8) -> list[list[int]]:
    """Batches of at most `limit` waiting requests, by index into `wanted`, the experts that each is known to need.

    As in the paper: take the expert that most of the waiting want, fill the batch with the oldest that want it, then go on with the next
    expert. Two additions: after the first expert the next is the one with the most takers per expert not in the batch yet, and a request that `patience` batches
    passed over opens the next one. window: how many requests wait at a time (they arrive in order). Every request is in one batch.
    """
    if limit < 1 or window < limit or patience < 1:
        raise UsageError(f"limit {limit}, window {window}, patience {patience} do not fit", "give 1 <= limit <= window, patience >= 1")
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
    active = {e for r in batch for e in wanted[r]}
    left = [r for r in waiting if r not in batch]
    if not batch and left:
        queues: dict[int, int] = {}
        for request in left:
            for expert in wanted[request]:
                queues[expert] = queues.get(expert, 0) + 1
        busiest = min(queues, key=lambda e: (-queues[e], e), default=None)
        batch.append(next((r for r in left if busiest in wanted[r]), left[0]))
        left.remove(batch[0])
        active |= set(wanted[batch[0]])
    while left and len(batch) < limit:
        request = min(left, key=lambda r: (len(set(wanted[r]) - active), left.index(r)))
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

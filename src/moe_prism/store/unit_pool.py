"""The pool of a store, where every key takes one slot: `Pool` with less to add up. Same answers, same counts (tested)."""

from __future__ import annotations

from collections.abc import Sequence

from ..offload.base import Access, Key, Load, Moment
from ..offload.cache.pool import Pool


class UnitPool(Pool):
    """A pool of `capacity` slots."""

    def request(self, keys: Sequence[Key], now: Moment, weights: Sequence[float] | None = None) -> Access:
        resident, policy, counts = self.resident, self.policy, self._counts
        weigh = dict(zip(keys, weights, strict=True)) if weights is not None else dict.fromkeys(keys, 1.0)
        self._expected.pop(now.layer, None)
        hits = tuple(k for k in keys if k in resident)
        for key in hits:
            if key in self._ahead:
                self._ahead.remove(key)
                counts.prefetch_used += 1
            policy.used(key, weigh[key], now)
        misses = [k for k in keys if k not in resident]
        counts.requested += len(keys)
        counts.requested_bytes += len(keys)
        counts.hits += len(hits)
        counts.hit_bytes += len(hits)
        counts.misses += len(misses)
        counts.missed_bytes += len(misses)
        if not misses:
            return Access(hits, ())
        held = self._held(keys)
        soft = held.union(*self._expected.values())
        stuck = len(resident & held)
        loads, bypassed = [], []
        for key in misses:
            policy.missed(key, weigh[key], now)
            if stuck >= self.capacity:
                bypassed.append(key)
                continue
            victims: tuple[Key, ...] = ()
            if self.room < 1:
                victim = policy.victim(soft if len(soft) <= len(held) or not resident <= soft else held, now)
                self._leave(victim, now)
                victims = (victim,)
            self._enter(key, weigh[key], now)
            stuck += 1
            counts.loads += 1
            loads.append(Load(key, victims))
        return Access(hits, tuple(loads), tuple(bypassed))

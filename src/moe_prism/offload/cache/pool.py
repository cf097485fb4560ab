"""The cache: what is resident, what is pinned, what was counted. Which key leaves is the policy's choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ...errors import UsageError
from ..base import Access, CacheCounts, CachePolicy, ExpertCache, Key, Load, Moment


def groups_of(keys: Iterable[Key], size_of: Callable[[Key], int], room: int) -> list[list[Key]]:
    """Keys in groups of at most `room` (or of one key), in their order."""
    groups: list[list[Key]] = []
    left = 0
    for key in keys:
        size = size_of(key)
        if size > left or not groups:
            groups.append([])
            left = room
        groups[-1].append(key)
        left -= size
    return groups


class Pool(ExpertCache):
    """One pool of `capacity` bytes (or slots, if every key has size 1)."""

    def __init__(self, capacity: int, policy: CachePolicy) -> None:
        if capacity < 0:
            raise UsageError(f"a cache of {capacity} bytes is impossible", "give a positive size")
        self.capacity, self.policy, self.size_of = capacity, policy, policy.size_of
        self.resident: set[Key] = set()
        self.room = capacity
        self._counts = CacheCounts()
        self._pinned: Counter[Key] = Counter()
        self._expected: dict[int, frozenset[Key]] = {}
        self._ahead: set[Key] = set()  # prefetched and not requested yet

    @property
    def counts(self) -> CacheCounts:
        return self._counts

    def request(self, keys: Sequence[Key], now: Moment, weights: Sequence[float] | None = None) -> Access:
        weigh = dict(zip(keys, weights, strict=True)) if weights is not None else dict.fromkeys(keys, 1.0)
        self._expected.pop(now.layer, None)
        hits = tuple(k for k in keys if k in self.resident)
        for key in hits:
            self._hit(key, weigh[key], now)
        held = self._held(keys)
        loads, bypassed = [], []
        for key in keys:
            if key in self.resident:
                continue
            self._counts.misses += 1
            self._counts.missed_bytes += self.size_of(key)
            self.policy.missed(key, weigh[key], now)
            victims = self._make_room(self.size_of(key), held, now)
            if victims is None:
                bypassed.append(key)
                continue
            self._enter(key, weigh[key], now)
            self._counts.loads += 1
            loads.append(Load(key, victims))
        self._counts.requested += len(keys)
        self._counts.requested_bytes += sum(map(self.size_of, keys))
        return Access(hits, tuple(loads), tuple(bypassed))

    def chunks(self, keys: Sequence[Key], layer: int) -> list[list[Key]]:
        fixed = sum(self.size_of(k) for k in self._pinned if k in self.resident)
        ordered = [k for k in keys if k in self.resident] + [k for k in keys if k not in self.resident]
        return groups_of(ordered, lambda key: 0 if key in self._pinned else self.size_of(key), self.capacity - fixed)

    def prefetch(self, keys: Sequence[Key], now: Moment) -> Access:
        held = self._held(keys).union(*self._expected.values())
        hits = tuple(k for k in keys if k in self.resident)
        loads, bypassed = [], []
        for key in keys:
            if key in self.resident:
                continue
            victims = self._make_room(self.size_of(key), held, now, firm=True)
            if victims is None:
                bypassed.append(key)
                continue
            self._enter(key, 0.0, now)
            self._ahead.add(key)
            self._counts.prefetched += 1
            self._counts.prefetched_bytes += self.size_of(key)
            loads.append(Load(key, victims))
        return Access(hits, tuple(loads), tuple(bypassed))

    def expect(self, layer: int, keys: Iterable[Key]) -> None:
        self._expected[layer] = frozenset(keys)

    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:
        self.policy.hint(layer, scores, now)

    def pin(self, keys: Iterable[Key]) -> None:
        self._pinned.update(keys)

    def unpin(self, keys: Iterable[Key]) -> None:
        """Take back one `pin` of each key."""
        for key in keys:
            if self._pinned[key] <= 1:
                del self._pinned[key]
            else:
                self._pinned[key] -= 1

    def drop(self, key: Key, now: Moment) -> None:
        if key not in self.resident:
            raise ValueError(f"key {key} is not resident")
        self._leave(key, now)

    def new_sequence(self) -> None:
        self.policy.new_sequence()

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        self.policy.foresee(uses)

    @property
    def pinned(self) -> set[Key]:
        return set(self._pinned)

    def __contains__(self, key: object) -> bool:
        return key in self.resident

    def __len__(self) -> int:
        return len(self.resident)

    def _held(self, keys: Iterable[Key]) -> set[Key]:
        return {*keys, *self._pinned}

    def _hit(self, key: Key, weight: float, now: Moment) -> None:
        self._counts.hits += 1
        self._counts.hit_bytes += self.size_of(key)
        if key in self._ahead:
            self._ahead.remove(key)
            self._counts.prefetch_used += 1
        self.policy.used(key, weight, now)

    def _make_room(self, size: int, held: set[Key], now: Moment, *, firm: bool = False) -> tuple[Key, ...] | None:
        """Evict until `size` fits; None, with nothing evicted, if that cannot be. Expected keys leave last, or never if `firm`."""
        if size <= self.room:
            return ()
        stuck = sum(self.size_of(k) for k in held if k in self.resident)
        if size > self.capacity - stuck:
            return None
        soft = held if firm else held.union(*self._expected.values())
        victims = []
        while size > self.room:
            # `held` is small and the pool is not: counting is cheaper than looking for a key that may leave
            blocked = soft if sum(k in self.resident for k in soft) < len(self.resident) else held
            victim = self.policy.victim(blocked, now)
            self._leave(victim, now)
            victims.append(victim)
        return tuple(victims)

    def _enter(self, key: Key, weight: float, now: Moment) -> None:
        self.resident.add(key)
        self.room -= self.size_of(key)
        self.policy.entered(key, weight, now)

    def _leave(self, key: Key, now: Moment) -> None:
        self.resident.remove(key)
        self.room += self.size_of(key)
        self._counts.evictions += 1
        if key in self._ahead:
            self._ahead.remove(key)
            self._counts.prefetch_wasted += 1
        self.policy.left(key, now)


class LayerPools(ExpertCache):
    """One pool per layer, each with its own quota."""

    def __init__(self, capacities: Sequence[int], policy: Callable[[int, int], CachePolicy]) -> None:
        """policy(layer, capacity) makes the policy of one layer's pool."""
        pools = [Pool(capacity, policy(layer, capacity)) for layer, capacity in enumerate(capacities)]
        self.pools: list[ExpertCache] = list(pools)
        self._layer = pools[0].policy.space.layer

    def request(self, keys: Sequence[Key], now: Moment, weights: Sequence[float] | None = None) -> Access:
        return self.pools[now.layer].request(keys, now, weights)

    def chunks(self, keys: Sequence[Key], layer: int) -> list[list[Key]]:
        return self.pools[layer].chunks(keys, layer)

    def prefetch(self, keys: Sequence[Key], now: Moment) -> Access:
        return self.pools[now.layer].prefetch(keys, now)

    def expect(self, layer: int, keys: Iterable[Key]) -> None:
        self.pools[layer].expect(layer, keys)

    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:
        self.pools[layer].hint(layer, scores, now)

    def pin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.pools[self._layer(key)].pin([key])

    def unpin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.pools[self._layer(key)].unpin([key])

    def drop(self, key: Key, now: Moment) -> None:
        self.pools[self._layer(key)].drop(key, now)

    def new_sequence(self) -> None:
        for pool in self.pools:
            pool.new_sequence()

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        for layer, pool in enumerate(self.pools):
            pool.foresee({key: clocks for key, clocks in uses.items() if self._layer(key) == layer})

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and key in self.pools[self._layer(key)]

    def __len__(self) -> int:
        return sum(map(len, self.pools))

    @property
    def counts(self) -> CacheCounts:
        return sum((pool.counts for pool in self.pools), CacheCounts())

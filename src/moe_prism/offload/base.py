"""The contracts of offloading: what a key is, what an eviction policy is told, what a request of the cache answers.

A cache works in *groups*: the keys that one step needs at one layer. They are needed together, so none of them evicts another as long
as they fit. The same objects serve the replay of a trace and a store of real weights: the cache decides which key leaves, whoever calls
it moves the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from .keys import Key, KeySpace
from .trace import Trace

if TYPE_CHECKING:
    from .cache.ranking import Ranking

__all__ = ["Access", "CacheCounts", "CachePolicy", "ExpertCache", "Key", "KeySpace", "Load", "Moment"]


class Moment(NamedTuple):
    """When a group is served: clock = step * L + layer, step counts forward passes, layer is where the step is."""

    clock: int
    step: int
    layer: int


class CachePolicy(ABC):
    """Which resident key leaves. Plain state, deterministic in (calls, seed); one policy belongs to one pool.

    The pool calls, for a request of a resident key: `used`; of another: `missed`, then `victim` and `left` as often as room is needed,
    then `entered`. `missed` is not called for a prefetched key. A key can also leave without `victim` (a load failed).
    """

    needs_future = False
    """Whether `foresee` must be called first: such a policy is a bound, not something that could run."""
    needs_fit = False
    """Whether it is of no use without what `fit` returns."""

    def __init__(self, space: KeySpace, slots: int, *, size_of: Callable[[Key], int] | None = None, seed: int = 0) -> None:
        """slots: how many keys the pool holds; size_of: bytes of a key, where keys differ."""
        self.space, self.slots, self.seed = space, slots, seed
        self.size_of = size_of or (lambda _key: 1)

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace, slots: int) -> dict[str, Any]:
        """Further arguments of this policy, from the calibration side of a trace; slots of the pool it will run in."""
        return {}

    @classmethod
    def shapes(cls, space: KeySpace) -> dict[str, tuple[int, ...]]:
        """Shape of every setting that `fit` may return, as settings from a file are checked; () = a number."""
        return {}

    def used(self, key: Key, weight: float, now: Moment) -> None:  # noqa: B027 - not every policy looks at hits
        """A resident key was requested; weight: the routing weight of its expert (largest of the group's tokens)."""

    def missed(self, key: Key, weight: float, now: Moment) -> None:  # noqa: B027
        """A key that is not resident was requested; room is made next."""

    @abstractmethod
    def entered(self, key: Key, weight: float, now: Moment) -> None:
        """The key is resident from now on."""

    @abstractmethod
    def left(self, key: Key, now: Moment) -> None:
        """The key is not resident any more."""

    @abstractmethod
    def victim(self, blocked: Container[Key], now: Moment) -> Key:
        """The resident key to evict, not in `blocked`; there is at least one, and any of them may be the only one.

        The pool does evict it, so state may change on the way.
        """

    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:  # noqa: B027
        """Scores [E] of one layer's experts, larger = needed sooner: a router's probabilities, or a prediction."""

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:  # noqa: B027
        """For bounds: the clocks (ascending) at which every key will be requested."""

    def ranking(self) -> Ranking | None:
        """What a compiled table needs to do the same, where that can be declared. None: a store asks in Python, which takes longer."""
        return None

    def new_sequence(self) -> None:  # noqa: B027
        """Another request of a user begins: statistics kept per sequence start again."""


class Load(NamedTuple):
    """A key to bring in, and the keys that give it their room."""

    key: Key
    victims: tuple[Key, ...]


@dataclass(frozen=True)
class Access:
    """The answer to a group: `hits` are resident, `loads` are to be loaded in order, `bypassed` found no room (everything is pinned
    or needed by the group itself) and are used from a buffer without becoming resident.
    """

    hits: tuple[Key, ...]
    loads: tuple[Load, ...]
    bypassed: tuple[Key, ...] = ()


@dataclass
class CacheCounts:
    """What a cache did, in keys and in the unit of its sizes. requested = hits + misses; loads + prefetched - evictions = resident."""

    requested: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0  # on demand; misses - loads were bypassed
    evictions: int = 0  # dropped keys included
    prefetched: int = 0
    prefetch_used: int = 0  # prefetched keys that were requested before they left
    prefetch_wasted: int = 0  # prefetched keys that left unused
    requested_bytes: int = 0
    hit_bytes: int = 0
    missed_bytes: int = 0
    prefetched_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requested if self.requested else 1.0

    @property
    def byte_hit_rate(self) -> float:
        return self.hit_bytes / self.requested_bytes if self.requested_bytes else 1.0

    @property
    def prefetch_precision(self) -> float:
        """Share of prefetched keys that were requested before they left."""
        return self.prefetch_used / self.prefetched if self.prefetched else 1.0

    @property
    def prefetch_recall(self) -> float:
        """Of the requests that would have missed, the share a prefetch turned into a hit."""
        needed = self.prefetch_used + self.misses
        return self.prefetch_used / needed if needed else 1.0

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class ExpertCache(ABC):
    """What replay and store drive: one pool for all layers, or one pool per layer."""

    @abstractmethod
    def request(self, keys: Sequence[Key], now: Moment, weights: Sequence[float] | None = None) -> Access:
        """One group: distinct keys of layer `now.layer`. Hits count as used, room is made for the others, which are then resident.

        Nothing of the group is evicted for the group. A live store pins the keys it is still reading or computing with.
        """

    @abstractmethod
    def chunks(self, keys: Sequence[Key], layer: int) -> list[list[Key]]:
        """A group cut into groups that fit, resident keys first: a long prompt can need more than the cache holds."""

    @abstractmethod
    def prefetch(self, keys: Sequence[Key], now: Moment) -> Access:
        """Make keys resident ahead of their use, as far as there is room beside pinned and expected ones; no request is counted.

        `now.layer` is the layer the keys belong to. Keys that are resident already are the hits.
        """

    @abstractmethod
    def expect(self, layer: int, keys: Iterable[Key]) -> None:
        """Predicted keys of a layer: not evicted before that layer's next request, unless nothing else can leave."""

    @abstractmethod
    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:
        """Scores [E] of a layer's experts, handed to the policy."""

    @abstractmethod
    def pin(self, keys: Iterable[Key]) -> None:
        """Never evict these until as many `unpin`."""

    @abstractmethod
    def unpin(self, keys: Iterable[Key]) -> None: ...

    @abstractmethod
    def drop(self, key: Key, now: Moment) -> None:
        """A resident key is lost (its load failed): it leaves, counted as an eviction."""

    @abstractmethod
    def new_sequence(self) -> None: ...

    @abstractmethod
    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def __len__(self) -> int:
        """Resident keys."""

    @property
    @abstractmethod
    def counts(self) -> CacheCounts: ...

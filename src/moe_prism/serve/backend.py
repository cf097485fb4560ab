"""What the HTTP side needs of an engine, whether it runs in a thread here or in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

from ..errors import PrismError
from ..forecast.step_cost import Totals
from ..schedule.base import Ladder
from .requests import Request


class Tally(NamedTuple):
    """What one step was, for metrics and the status page."""

    seconds: float
    asked: float  # of them, seconds the policy took
    levels: dict[int, int]  # level -> tokens computed at it
    prompt: int  # prompt tokens computed
    generated: int  # tokens drawn

    @property
    def tokens(self) -> int:
        return sum(self.levels.values())


class ExpertReads(NamedTuple):
    """Experts on disk, since the engine's start; the last two are of the last requests of layers, as `store.live_figures` says."""

    steps: int = 0
    tokens: int = 0
    requested: int = 0  # records that layers asked for, each once per layer and step
    missed: int = 0
    bytes: int = 0  # read
    waited: float = 0.0  # seconds in which nothing could be computed
    hit_rate: float | None = None
    bound: float | None = None  # that of Belady's rule, which knows the future


class Gauges(NamedTuple):
    """How things stand in the engine."""

    running: int = 0  # sequences in the batch
    waiting: int = 0
    cache: float = 0.0  # used share of the KV cache
    failed_steps: int = 0  # since the start
    restarts: int = 0  # of its process
    drafted: int = 0  # tokens that requests drafted for themselves, since the engine's start
    kept: int = 0  # of them, those that were right
    reads: ExpertReads | None = None  # None: all experts are in memory


class Ran(Protocol):
    """What was computed between two looks at the queue: a step of the batch, or one beside it."""

    @property
    def totals(self) -> Totals | None:
        """What a cost model prices; None: nothing that it knows."""

    def tally(self, seconds: float) -> Tally:
        """In numbers, once it took `seconds`."""

    def told(self) -> tuple[tuple[str, int, int, int], ...]:
        """Request, level, tokens computed, tokens found in the prefix cache, of each part."""


class AdapterFacts(NamedTuple):
    """A fine-tune that requests may name. experts: that it changes, of all layers; bytes: of memory; digest: of what it computes."""

    name: str
    experts: int
    bytes: int
    digest: str


Told = Callable[[PrismError | None], None]
"""Hears of the end of a change: why it was not made, or None."""
State = Literal["ready", "restarting", "stopped"]


class Backend(Protocol):
    """An engine that runs. Everything but `stop` may be called on the event loop and does not block it."""

    @property
    def ladder(self) -> Ladder: ...

    @property
    def context(self) -> int:
        """Tokens a sequence may have."""

    @property
    def eos(self) -> frozenset[int]:
        """Tokens that end a sequence."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def policy_name(self) -> str: ...

    @property
    def book(self) -> Mapping[str, Request]:
        """Unfinished requests by id."""

    @property
    def adapters(self) -> Mapping[str, AdapterFacts]:
        """By name, those that are loaded."""

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load a folder under a name, between two steps. PrismError where that cannot be."""

    async def unload_adapter(self, name: str) -> None:
        """Take one out. PrismError where there is none of that name, or while requests use it."""

    @property
    def pid(self) -> int:
        """Of the process that computes."""

    @property
    def alive(self) -> bool:
        """Requests can be submitted."""

    @property
    def state(self) -> State:
        """restarting: it is not alive, and will be again."""

    @property
    def last_turn(self) -> float:
        """When its loop last came round, on `clock`."""

    def clock(self) -> float: ...

    async def attach(self) -> None:
        """Called once, on the event loop that will submit requests."""

    async def detach(self) -> None:
        """Called once, before that loop ends."""

    def submit(self, request: Request) -> None:
        """Queue a request. Its sink gets every event, the last one with `finish` or `error`. PrismError if the engine has stopped."""

    def cancel(self, request_id: str) -> None:
        """Drop a request; its sink is not called again."""

    def gauges(self) -> Gauges: ...

    def ended(self) -> str | None:
        """Why it stopped though nobody asked it to; None if it did not."""

    def give_up(self, seconds: float) -> None:
        """It has not come round for so long: end it by force, if it has a process of its own."""

    def stop(self) -> None:
        """End it; what is unfinished gets an error."""

"""What the HTTP side hands to the engine and what comes back. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from ..schedule.base import Job, Progress

PLAIN = "plain"
"""One forward for each token."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; seed None draws a fresh one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    logprobs: int | None = None  # alternatives to report per generated token; None: none, not even the token's own
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()  # token, what is added to its logit
    allowed: tuple[int, ...] = ()  # if any, no others are drawn
    min_tokens: int = 0  # before so many are generated, none of the request's stop_ids is drawn
    grammar: str = ""  # what the answer must follow, as `text.jobs.Compiled` has it
    self_draft: bool = (
        False  # whether tokens may be drafted at the engine's low budget and checked together; no token changes by it
    )
    decode: str = PLAIN  # a method of decoding with its settings, as `generate --decode` has it
    rewire: int = 0  # steps that fit a vector on the router's logits to the prompt

    @property
    def is_beside(self) -> bool:
        """Whether the request runs beside the batch (`engine.decoding`)."""
        return self.decode != PLAIN or self.rewire > 0


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability and the most likely alternatives (token id, log-probability), best first."""

    token: int
    logprob: float | None  # None for the first token of a prompt: nothing predicts it
    top: tuple[tuple[int, float], ...] = ()


class ErrorKind(Enum):
    """Why a request ended with an error."""

    ENGINE = "engine"  # it stopped, a step failed, or it did not take the request
    DEADLINE = "deadline"
    NOT_FINITE = "not finite"  # the model returned such numbers for this request
    RULED_OUT = "ruled out"  # what it asked for leaves none that could come next
    REFUSED = "refused"  # what it asked for cannot be done


class Event(NamedTuple):
    """One step's news of one request: a token, a finish ("stop", "length"), prompt log-probabilities, or an error."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] = ()
    level: int | None = None
    finish: str | None = None
    error: str | None = None
    kind: ErrorKind = ErrorKind.ENGINE  # of the error
    facts: dict[str, Any] | None = None  # with the finish: what a method of decoding says of its work


Sink = Callable[[Event], None]


class Track(Progress):
    """A Progress that the engine advances in place: a policy sees every request every step, and a copy of each would cost more than
    the policy itself. Policies treat it as the frozen Progress it is declared to be.
    """

    def advance(self, **changes: Any) -> None:
        """Set fields; `computed` and the like are read-only to everybody else."""
        self.__dict__.update(changes)


@dataclass
class Request:
    """One sequence to generate, as the engine knows it."""

    job: Job
    tokens: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    sink: Sink
    deadline: float | None = None  # engine clock; the request is ended with an error then
    salt: str = ""  # prefixes are shared only among requests of the same salt
    adapter: str = ""  # name of the fine-tune that answers; "": the model itself
    track: Track = field(init=False)
    levels: dict[int, int] = field(default_factory=dict)  # level -> tokens computed at it
    cancelled: bool = False  # set by any thread; the engine's thread takes it out
    begun: float | None = None  # engine clock: the first step that computed something of it
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    computed_at: list[int] = field(default_factory=list)  # level of every token in the cache; kept only with a prefix cache
    matcher: Any = None  # follows the grammar of `sampling`; the engine's own

    def __post_init__(self) -> None:
        self.track = Track(self.job)

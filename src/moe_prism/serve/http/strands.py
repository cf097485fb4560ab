"""The sequences of an answer: into the engine, and from its events to pieces of text."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...schedule.classes import RequestClass
from ..requests import Event, Request, Sampling, TokenLogprob
from .detokenize import Detokenizer, Shown, Stops, detokenizer
from .protocol import Common
from .refusal import Refusal
from .vocabulary import Vocabulary


class Mail:
    """Carries events from the engine's thread to the event loop, one wake-up for all that come together. An engine in another process
    speaks on the event loop itself. Made on that loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._home = threading.get_ident()
        self._waiting: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._lock = threading.Lock()
        self._called = False

    def post(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """Leave an event for the event loop; from any thread."""
        if threading.get_ident() == self._home:
            queue.put_nowait(event)
            return
        self._waiting.append((queue, event))
        with self._lock:
            if self._called:
                return
            self._called = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            self._called = False
        while self._waiting:
            queue, event = self._waiting.popleft()
            queue.put_nowait(event)


@dataclass
class Wish:
    """A request's share of the serving contract, after its class and its own fields. adapter: the fine-tune that answers; "": none."""

    kind: RequestClass
    floor: int
    ceiling: int
    ttft: float | None
    tpot: float | None
    priority: int
    adapter: str = ""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What ends an answer before its length. ids: tokens that do, eos among them; named: those a client asked for; texts: stop strings;
    least: tokens before any of them counts; show: what ended it stays in the text.
    """

    ids: frozenset[int] = frozenset()
    named: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    least: int = 0
    show: bool = False

    @classmethod
    def read(cls, body: Common, eos: frozenset[int], vocabulary: Vocabulary) -> Ends:
        """Of a request. A special token does not show in the text, so its name is looked for among the tokens."""
        names = vocabulary.by_name if body.skip_special_tokens else {}
        tokens = {names[text] for text in body.stops if text in names}
        texts = tuple(text for text in body.stops if text not in names)
        mixed = next((name for text in texts for name in names if name in text), None)
        if mixed:
            raise Refusal(
                400,
                f"the special token '{mixed}' among other text never shows; give it alone, or skip_special_tokens false",
                param="stop",
            )
        named = frozenset([*(body.stop_token_ids or []), *tokens])
        ids = named if body.ignore_eos else named | eos
        return cls(ids=ids, named=named, texts=texts, least=body.min_tokens, show=body.include_stop_str_in_output)


@dataclass(frozen=True, kw_only=True)
class StrandRequest:
    """One sequence that is to be generated. index: its place in the answer; output: tokens at most; echo: the text begins with the
    prompt; silent: no token was asked for, and the engine generates one that nobody sees; salt: of its prefix cache.
    """

    id: str
    index: int
    prompt: list[int]
    sampling: Sampling
    wish: Wish
    output: int
    ends: Ends
    echo: bool = False
    silent: bool = False
    hide_special: bool = True
    salt: str = ""


class Scored(NamedTuple):
    """A token's log-probability, and its place in the text."""

    entry: TokenLogprob
    step: Shown


@dataclass
class Piece:
    """What one event adds to one sequence. prompt: log-probabilities of the prompt's tokens, with or without echo."""

    text: str = ""
    logprobs: tuple[Scored, ...] = ()
    tokens: tuple[int, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    reason: int | str | None = None  # the stop string or the token that ended it
    facts: dict[str, Any] | None = None  # with the finish: what a method of decoding says of its work

    def and_then(self, later: Piece) -> Piece:
        """Both as one."""
        return Piece(
            self.text + later.text,
            self.logprobs + later.logprobs,
            self.tokens + later.tokens,
            self.prompt + later.prompt,
            later.finish,
            later.reason,
            later.facts,
        )


@dataclass
class Strand:
    """One sequence of an answer, as it grows."""

    asked: StrandRequest
    request: Request
    events: asyncio.Queue[Event]
    vocabulary: Vocabulary
    started: float
    first: float | None = None
    last: float | None = None
    generated: int = 0
    _shown: list[Shown] = field(default_factory=list)  # of the prompt, until it is given out

    def __post_init__(self) -> None:
        asked = self.asked
        before: Sequence[int] = () if asked.echo else asked.prompt
        self.text: Detokenizer = detokenizer(self.vocabulary, before, hide=asked.hide_special)
        self.stops = Stops(asked.ends.texts, show=asked.ends.show)
        self._shown = [self.text.push(token) for token in asked.prompt] if asked.echo else []
        self._prompt: list[TokenLogprob] = []

    @property
    def index(self) -> int:
        return self.asked.index

    @property
    def cut(self) -> bool:
        """A stop string was found, which the engine knows nothing of."""
        return self.stops.found is not None

    def piece(self, event: Event) -> Piece:
        """What an event adds. The prompt's share waits for the first token."""
        self._prompt += event.prompt
        if event.token is None:
            return Piece()
        prompt, self._prompt = self._prompt, []
        shown, self._shown = self._shown, []
        text = "".join(step.text for step in shown)
        scored = [Scored(entry, step) for entry, step in zip(prompt, shown, strict=False)]
        if self.asked.silent:
            return Piece(text + self.text.rest(), tuple(scored), (), tuple(prompt), "length")
        self.generated += 1
        step, new = self._token(event)
        if event.logprob is not None:  # of the end token too: lm-eval drops one generated token
            scored.append(Scored(event.logprob, step))
        finish = "stop" if self.cut else event.finish
        reason = (
            self.stops.found if self.cut else event.token if finish == "stop" and event.token in self.asked.ends.named else None
        )
        rest = self.stops.rest() if finish else ""
        return Piece(text + new + rest, tuple(scored), (event.token,), tuple(prompt), finish, reason, event.facts)

    def _token(self, event: Event) -> tuple[Shown, str]:
        """Where a token lies, and the text that may be shown after it."""
        assert event.token is not None
        ends = event.token in self.asked.ends.ids and event.finish == "stop"
        step = Shown("", self.text.characters, b"") if ends and not self.asked.ends.show else self.text.push(event.token)
        text = step.text + (self.text.rest() if event.finish else "")
        return step, text if self.generated <= self.asked.ends.least else self.stops.push(text)

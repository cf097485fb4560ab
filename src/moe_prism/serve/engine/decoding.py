"""Requests with a method of decoding, or with a router that is fitted to their prompt: they run beside the batch, between its steps.

Such a request follows several forwards, takes tokens back, or runs at a point of its own. Its caches are transformers' own, one for each
sequence that its method holds, and the code is that of `generate --decode`: so the tokens are too. Between two steps of the batch each of
these requests takes one small step, a token of one sequence. What they read adds to what the batch reads, and is shared with nobody.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...methods.decode.base import Decoded, DecodeMethod, DecodeRun, Verifier, plain, refuse_held
from ...methods.decode.run import asked_decoding, decoder_of
from ...methods.skip.rewiring import Rewired, Rewiring, rewiring
from ...point import OperatingPoint
from ...schedule.base import Ladder
from ..backend import Tally
from ..requests import PLAIN, ErrorKind, Event, Request, Sampling
from .processors import processors
from .runner import SAID

logger = logging.getLogger(__name__)


class NoTokenError(Exception):
    """A request's logits gave none. kind: why."""

    def __init__(self, kind: ErrorKind) -> None:
        super().__init__(SAID[kind])
        self.kind = kind


class DecodingOffer(NamedTuple):
    """What requests may ask for: methods by name, `rewiring` among them. verifier: of methods that want one."""

    names: Sequence[str]
    verifier: Verifier | None = None


@dataclass(frozen=True, kw_only=True)
class DecodingSetup:
    """What the engine has for these requests. attention: of the model outside of the batch; numbers: of adapters that are loaded, by name.

    most: such requests at once; tokens: of all their caches together; chunk: of a prompt, in one forward.
    """

    model: Any
    elastic: Elastic
    ladder: Ladder
    tokenizer: Any
    attention: str
    numbers: Callable[[str], int]
    served: DecodingOffer
    most: int
    tokens: int
    chunk: int


@dataclass(eq=False)
class BesideRequest:
    """One request on its way. steps: what is left of it; tokens: its caches may hold; news: tokens that nobody has heard of."""

    request: Request
    level: int
    tokens: int
    steps: Generator[None, None, dict[str, Any]]
    computed: int = 0
    generated: int = 0
    news: list[Event] = field(default_factory=list)

    @property
    def lasting(self) -> int:
        """Tokens that were computed for the answer: the last one is not."""
        return self.computed + max(0, self.generated - 1)


@dataclass(frozen=True)
class BesideStep:
    """What these requests computed between two steps of the batch, as `backend.Ran` has it. No cost model prices it."""

    parts: tuple[tuple[str, int, int, int], ...]
    prompt: int
    generated: int
    totals: None = None

    def tally(self, seconds: float) -> Tally:
        """In numbers."""
        levels: dict[int, int] = {}
        for _, level, tokens, _ in self.parts:
            levels[level] = levels.get(level, 0) + tokens
        return Tally(seconds, 0.0, levels, self.prompt, self.generated)

    def told(self) -> tuple[tuple[str, int, int, int], ...]:
        """Request, level, tokens computed, tokens found in the prefix cache."""
        return self.parts


class Decodings:
    """All of an engine. `add` may be called from any thread, the rest by the engine's."""

    def __init__(self, setup: DecodingSetup, book: dict[str, Request]) -> None:
        self._setup, self._book = setup, book
        self._arrived: deque[BesideRequest] = deque()
        self.waiting: deque[BesideRequest] = deque()
        self.running: list[BesideRequest] = []

    def add(self, request: Request) -> None:
        """Queue a request that is in the book. UsageError for one that cannot be done."""
        self._arrived.append(self._opened(request))

    def __len__(self) -> int:
        return len(self._arrived) + len(self.waiting) + len(self.running)

    def turn(self, finish: Callable[[Request, Event], None]) -> BesideStep | None:
        """One small step of each request that runs; None: there is none. finish: ends a request with its last event."""
        while self._arrived:
            self.waiting.append(self._arrived.popleft())
        for own in [own for own in (*self.running, *self.waiting) if self._is_gone(own)]:
            (self.running if own in self.running else self.waiting).remove(own)
            own.steps.close()
            self._book.pop(own.request.job.id, None)
        while self.waiting and len(self.running) < self._setup.most and self._fits(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        if not self.running:
            return None
        before = [(own, own.computed, own.generated, own.lasting) for own in self.running]
        with self._outside():
            for own in list(self.running):
                self._step(own, finish)
        return BesideStep(
            tuple((own.request.job.id, own.level, own.lasting - lasting, 0) for own, _, _, lasting in before),
            sum(own.computed - computed for own, computed, _, _ in before),
            sum(own.generated - generated for own, _, generated, _ in before),
        )

    def clear(self) -> None:
        """The engine stops."""
        self._arrived.clear()
        self.waiting.clear()
        self.running.clear()

    def _is_gone(self, own: BesideRequest) -> bool:
        return own.request.cancelled or own.request.job.id not in self._book

    def _fits(self, own: BesideRequest) -> bool:
        return sum(other.tokens for other in self.running) + own.tokens <= self._setup.tokens

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Attention as it is without a batch."""
        config = self._setup.model.config
        of_batch = config._attn_implementation
        config._attn_implementation = self._setup.attention
        try:
            yield
        finally:
            config._attn_implementation = of_batch

    def _step(self, own: BesideRequest, finish: Callable[[Request, Event], None]) -> None:
        last: Event | None = None
        try:
            next(own.steps)
        except StopIteration as stop:
            token = own.news.pop()
            how = "stop" if token.token in own.request.stop_ids else "length"
            last = token._replace(finish=how, facts=stop.value)
        except NoTokenError as error:
            last = Event(error=str(error), kind=error.kind)
        except UsageError as error:
            last = Event(error=error.cause, kind=ErrorKind.REFUSED)
        except Exception as error:
            logger.exception("a request with a method of decoding failed")
            last = Event(error=f"the step failed: {type(error).__name__}")
        own.request.levels[own.level] = own.lasting
        for event in () if own.request.cancelled else own.news:
            own.request.sink(event)
        own.news.clear()
        if last is not None:
            self.running.remove(own)
            finish(own.request, last)

    # ---- one request

    def _opened(self, request: Request) -> BesideRequest:
        setup, sampling, job = self._setup, request.sampling, request.job
        level = job.ceiling if job.ceiling >= 0 else setup.ladder.top
        point = setup.ladder.levels[level].point
        method = self._method(sampling, point)
        sequences = 1 if method is None else method.sequences
        tokens = sequences * (job.prompt + job.output)
        if tokens > setup.tokens:
            raise UsageError(
                f"{sequences} sequences of {job.prompt + job.output} tokens pass engine.cache_tokens, {setup.tokens}",
                "ask for fewer tokens, or fewer sequences",
            )
        if sampling.rewire and job.prompt > setup.chunk:
            raise UsageError(
                f"a prompt of {job.prompt} tokens is not fitted at once: engine.step_tokens is {setup.chunk}", "shorten it"
            )
        own = BesideRequest(request, level, tokens, iter(()))  # type: ignore[arg-type]
        own.steps = self._answer(own, method, point)
        return own

    def _method(self, sampling: Sampling, point: OperatingPoint) -> DecodeMethod | None:
        """What is asked for, checked against the model; None: one forward for each token."""
        name, setup = sampling.decode.partition(":")[0], self._setup
        for asked in (name, "rewiring" if sampling.rewire else PLAIN):
            if asked != PLAIN and asked not in setup.served.names:
                raise UsageError(f"this server does not decode by '{asked}'", "start it with --decoding")
        if name == PLAIN:
            refuse_held(setup.elastic, point, "rewiring")
            return None
        return decoder_of(setup.elastic, replace(point, decoding=asked_decoding(sampling.decode)))

    def _answer(
        self, own: BesideRequest, method: DecodeMethod | None, point: OperatingPoint
    ) -> Generator[None, None, dict[str, Any]]:
        setup, request = self._setup, own.request
        facts: dict[str, Any] = {"method": request.sampling.decode.partition(":")[0]}
        if request.sampling.rewire:
            ids = torch.tensor([list(request.tokens)], device=setup.model.device)
            done: Rewired = yield from rewiring(setup.model, setup.elastic, ids, Rewiring(steps=request.sampling.rewire))
            facts["rewired"] = done.to_json()
            point = point if done.stage is None else replace(point, routing=(done.stage, *point.routing))
        run = self._run(own, point)
        made: Decoded = yield from (plain(run) if method is None else method.steps(run))
        return {**facts, **made.facts, "rows": run.spent.rows}

    def _run(self, own: BesideRequest, point: OperatingPoint) -> DecodeRun:
        setup, request, sampling = self._setup, own.request, own.request.sampling
        generator = torch.Generator(device=setup.model.device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        own.computed = len(request.tokens)

        def hear(token: int) -> None:
            own.generated += 1
            own.news.append(Event(token, level=own.level))

        return DecodeRun(
            model=setup.model,
            tokenizer=setup.tokenizer,
            elastic=setup.elastic,
            point=point,
            prompt=list(request.tokens),
            shaped=_Shaped(sampling, len(request.tokens), request.stop_ids),
            ended=lambda ids: int(ids[0, -1]) in request.stop_ids or ids.shape[1] >= len(request.tokens) + request.job.output,
            samples=sampling.temperature > 0,
            heard=hear,
            verifier=setup.served.verifier,
            generator=generator,
            chunk=setup.chunk,
            adapter=setup.numbers(request.adapter) if request.adapter else -1,
        )


class _Shaped:
    """A request's processors of logits, then transformers' temperature and cuts, in transformers' order."""

    def __init__(self, sampling: Sampling, prompt: int, stop_ids: frozenset[int]) -> None:
        self._processors = LogitsProcessorList([*processors(sampling, prompt, stop_ids, None), *_warpers(sampling)])

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids [1, t], scores [1, V]. NoTokenError where no token can be drawn."""
        if not torch.isfinite(scores.max()):
            raise NoTokenError(ErrorKind.NOT_FINITE)
        shaped: Tensor = self._processors(ids, scores)
        if not torch.isfinite(shaped.max()):
            raise NoTokenError(ErrorKind.RULED_OUT)
        return shaped


def _warpers(sampling: Sampling) -> Sequence[Any]:
    made: list[Any] = []
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            made.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            made.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            made.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            made.append(MinPLogitsWarper(float(sampling.min_p)))
    return made

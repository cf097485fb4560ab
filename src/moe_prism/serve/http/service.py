"""From a checked request to sequences in the engine, and from their events to pieces of text."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...errors import PrismError, UsageError
from ...schedule.base import Job, Ladder
from ..backend import Backend
from ..config import Config
from ..requests import ErrorKind, Event, Request
from ..spans import SpanWriter
from ..text.jobs import Compile
from .metrics import Metrics
from .protocol import Common
from .refusal import Refusal
from .strands import Mail, Piece, Strand, StrandRequest, Wish
from .vocabulary import Vocabulary


class Service:
    """Everything the routes need. Lives on the event loop. drafts: whether the engine lets requests draft for themselves; spans: who hears
    of ended requests, if anybody does; decoding: the methods that a request may ask for; verifies: whether there is a verifier for those
    that want one.
    """

    drafts = False
    spans: SpanWriter | None = None
    decoding: Sequence[str] = ()
    verifies = False

    def __init__(
        self, engine: Backend, tokenizer: Any, config: Config, metrics: Metrics, name: str, usual: str | None = None
    ) -> None:
        """usual: the operating point of requests that say no quality."""
        self.engine, self.tokenizer, self.config, self.metrics, self.name = engine, tokenizer, config, metrics, name
        self.ladder: Ladder = engine.ladder
        self.usual = None if usual is None else self._level_of(usual)
        self.context, self.eos, self.vocabulary = engine.context, engine.eos, engine.vocabulary
        self.words = Vocabulary(tokenizer, engine.vocabulary)
        self.most_bytes = engine.context * self.words.longest * (1 if self.words.plain else 4)
        """Bytes that a prompt may have: a longer text has too many tokens, whatever they are. A normalizer may shorten it first."""
        self.fingerprint = "prism-" + secrets.token_hex(4)
        self.leaving: set[str] = set()  # adapters that no new request may name
        self._mail: Mail | None = None
        self._live: dict[str, Strand] = {}

    # ---- before the engine

    def wish(self, body: Common) -> Wish:
        """Class, levels and targets. `quality` alone fixes the level; `min_quality` lets load lower it to there."""
        kind = self.config.classes.get(body.kind or self.config.default_class)
        if kind is None:
            raise Refusal(400, f"no class '{body.kind}'; choose one of: {', '.join(self.config.classes)}", param="class")
        floor, ceiling = self.ladder.at_least(kind.min_quality), self.ladder.at_least(kind.max_quality)
        adapter, behind = self._named(body)
        quality, source = self._quality(body, behind)
        if quality is None and body.min_quality is None and self.usual is not None:
            floor = ceiling = self.usual
        if quality is not None:
            ceiling = self.level(quality, source)
            floor = ceiling
        if body.min_quality is not None:
            floor = self.level(body.min_quality, "min_quality")
            if quality is not None and floor > ceiling:
                raise Refusal(400, "min_quality is above quality", param="min_quality")
            ceiling = max(ceiling, floor)
        ttft = body.ttft_ms / 1000 if body.ttft_ms is not None else kind.ttft
        tpot = body.tpot_ms / 1000 if body.tpot_ms is not None else kind.tpot
        return Wish(kind, floor, ceiling, ttft, tpot, kind.priority if body.priority is None else body.priority, adapter)

    def _level_of(self, name: str) -> int:
        """The level of a point that the server was started with; one that keeps everything is the model itself."""
        names = [level.name for level in self.ladder.levels]
        return names.index(name) if name in names else self.ladder.top

    @property
    def adapters(self) -> list[str]:
        """Those that a request may name."""
        return [name for name in self.engine.adapters if name not in self.leaving]

    def _named(self, body: Common) -> tuple[str, str | None]:
        """(adapter, quality) in the model's name: NAME[:ADAPTER][@QUALITY]; no adapter: "", no quality: None. Refusal for another model."""
        if body.model in (None, self.name):
            return "", None
        asked, at, quality = str(body.model).rpartition("@")
        for known, adapter in ((self.name, ""), *((f"{self.name}:{own}", own) for own in self.adapters)):
            if body.model == known:
                return adapter, None
            if at and asked == known:
                return adapter, quality
        message = (
            f"no model '{str(body.model)[:64]}'; this server has '{self.name}', and '{self.name}@QUALITY' for a fixed quality"
        )
        told = f"; '{self.name}:ADAPTER' with one of: {', '.join(self.adapters[:16])}" if self.adapters else ""
        raise Refusal(404, message + told, code="model_not_found", param="model")

    def _quality(self, body: Common, behind: str | None) -> tuple[float | str | None, str]:
        """What fixes the level, and in which field: `quality`, or behind the model's name for clients that can add no field."""
        if behind is None:
            return body.quality, "quality"
        if body.quality is not None:
            raise Refusal(400, "quality is given twice, in the model's name too", param="quality")
        return _number(behind), "model"

    def level(self, wanted: float | str, field_name: str) -> int:
        """A quality 0..1, the name of an operating point, or a name of the configuration."""
        if isinstance(wanted, str):
            if wanted in self.config.names:
                return self.ladder.at_least(self.config.names[wanted])
            names = [level.name for level in self.ladder.levels]
            if wanted not in names:
                choices = ", ".join([*self.config.names, *names])
                raise Refusal(400, f"no operating point of that name; choose one of: {choices}", param=field_name)
            return names.index(wanted)
        return self.ladder.at_least(wanted)

    def output_tokens(self, prompt: int, asked: int | None) -> int:
        """How many tokens a sequence may generate. 400 if they do not fit the context."""
        room = self.context - prompt
        if room < 1 or (asked or 0) > room:
            raise Refusal(
                400,
                f"{prompt} prompt tokens and {asked if asked is not None else 1} new ones pass the context limit of {self.context}",
                code="context_length_exceeded",
                param="max_tokens",
            )
        return max(1, room if asked is None else asked)

    def form(self, body: Common) -> Compile | None:
        """The form that the answer must have; None for any text."""
        form = body.form()
        if form is None:
            return None
        param = "response_format" if body.structured_outputs is None else "structured_outputs"
        if not self.eos:
            raise Refusal(400, "a form needs a model with an end token", param=param, code="unsupported")
        for name in ("ignore_eos", "min_tokens", "allowed_token_ids"):
            if getattr(body, name):
                raise Refusal(400, f"{name} cannot be kept together with {param}", param=name)
        return Compile(*form, self.vocabulary, sorted(self.eos))

    # ---- in the engine

    def launch(self, asked: StrandRequest) -> Strand:
        """Queue one sequence. Refusal if the engine does not take it."""
        loop = asyncio.get_running_loop()
        self._mail = self._mail or Mail(loop)
        mail, queue, wish, prompt = self._mail, asyncio.Queue[Event](), asked.wish, asked.prompt
        now = self.engine.clock()
        targets = (wish.floor, wish.ceiling, wish.ttft, wish.tpot, wish.priority, wish.kind.name)
        job = Job(asked.id, now, len(prompt), asked.output, *targets)
        deadline = now + self.config.bounds.request_seconds
        request = Request(
            job, prompt, asked.sampling, asked.ends.ids, lambda event: mail.post(queue, event), deadline, asked.salt, wish.adapter
        )
        sequence = Strand(asked, request, queue, self.words, now)
        try:
            self.engine.submit(request)
        except PrismError as error:
            if isinstance(error, UsageError) and asked.sampling.is_beside:
                raise self._failure(error.cause, ErrorKind.REFUSED) from error
            raise Refusal(503, error.cause, code="engine", retry=10) from error
        self._live[asked.id] = sequence
        return sequence

    async def pieces(self, sequence: Strand) -> AsyncIterator[Piece]:
        """The sequence's text as it comes; ends after a piece with `finish`. Refusal if the engine ended it with an error."""
        held = Piece()
        try:
            while True:
                event = await sequence.events.get()
                if event.error is not None:
                    raise self._failure(event.error, event.kind)
                self._stamp(sequence, event)
                piece = sequence.piece(event)
                held = held.and_then(piece)
                if piece.text or piece.finish or piece.prompt:
                    yield held
                    held = Piece()
                if piece.finish:
                    return
        finally:
            self.drop(sequence)

    def _stamp(self, sequence: Strand, event: Event) -> None:
        if event.token is None:
            return
        now = self.engine.clock()
        kind = sequence.request.job.kind
        if sequence.first is None:
            sequence.first = now
            self.metrics.latency(self.metrics.ttft, kind, now - sequence.started)
            self.metrics.remember("ttft", kind, now - sequence.started)
        elif sequence.last is not None:
            self.metrics.latency(self.metrics.gap, kind, now - sequence.last)
        sequence.last = now

    def _failure(self, error: str, kind: ErrorKind) -> Refusal:
        if kind is ErrorKind.NOT_FINITE:
            self.metrics.nan.inc()
        if kind is ErrorKind.DEADLINE:
            return Refusal(504, error, code="deadline")
        if kind is ErrorKind.RULED_OUT:
            return Refusal(400, error, code="no_token")
        if kind is ErrorKind.REFUSED:
            return Refusal(400, error, param="decode", code="unsupported")
        return Refusal(503, error, code="engine", retry=1)

    def drop(self, sequence: Strand) -> None:
        """Free what a sequence holds; harmless if it has ended."""
        job = sequence.request.job
        if self._live.pop(job.id, None) is None:
            return
        if sequence.cut or job.id in self.engine.book:
            self.engine.cancel(job.id)
        self.metrics.latency(self.metrics.e2e, job.kind, self.engine.clock() - sequence.started)
        if sequence.request.begun is not None:
            self.metrics.latency(self.metrics.queue, job.kind, sequence.request.begun - sequence.started)
        self.metrics.cached.inc(sequence.request.cached_tokens)
        self.metrics.queried.inc(len(sequence.asked.prompt))
        if job.ttft is not None:
            self.metrics.target(job.kind, "ttft", sequence.first is not None and sequence.first - sequence.started <= job.ttft)
        if sequence.generated > 1 and sequence.first is not None and sequence.last is not None:
            pace = (sequence.last - sequence.first) / (sequence.generated - 1)
            self.metrics.remember("tpot", job.kind, pace)
            if job.tpot is not None:
                self.metrics.target(job.kind, "tpot", pace <= job.tpot)

    def served(self, sequences: Sequence[Strand]) -> dict[str, Any]:
        """The operating points that computed an answer, by tokens."""
        tokens: dict[int, int] = {}
        for sequence in sequences:
            for level, count in sequence.request.levels.copy().items():  # an engine in a thread may be writing
                tokens[level] = tokens.get(level, 0) + count
        levels = self.ladder.levels
        quality, slots = self.ladder.mean(tokens)
        return {
            "point": levels[next(iter(tokens))].name if len(tokens) == 1 else "mixed" if tokens else None,
            "quality": round(quality, 6) if tokens else None,
            "slots": round(slots, 4) if tokens else None,
            "tokens": {levels[i].name: n for i, n in sorted(tokens.items())},
            "points": {levels[i].name: levels[i].point.to_json() for i in sorted(tokens)},
        }

    def gauges(self) -> None:
        """Bring the gauges up to date before they are read."""
        self.metrics.set_gauges(self.engine.gauges())


def _number(text: str) -> float | str:
    """A quality 0..1 where the text is one, else the text, which then is a name."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if 0 <= number <= 1 else text

"""The cost model of this machine: a few seconds of real steps, of several shapes and levels, before the first request."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

from ...errors import PrismError
from ...forecast.step_cost import CostModel, StepSample
from ...schedule.base import Job, Ladder, Limits, Policy, Progress, Work
from ..backend import Ran
from ..requests import Event, Request, Sampling
from .attends import context_limit
from .engine import Engine, layer_facts

WARM_UP = 6  # first steps, in which buffers are allocated and pages touched
LEAST = 48  # steps below which the time is exceeded rather than the fit starved
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Script(Policy):
    """Runs steps of chosen shapes: single chunks while there are prompts, then batches of decodes, with and without a chunk."""

    def __init__(self, ladder: Ladder, seed: int = 0) -> None:
        top = ladder.top
        self._levels = sorted({0, top // 3, 2 * top // 3, top})
        self._random = random.Random(seed)  # noqa: S311 - shapes, not secrets
        self._shape = self._shapes()

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        batch, chunk, level = next(self._shape)
        ready = sorted((p for p in running if p.remaining_prompt <= 0), key=lambda p: p.context)
        if self._random.random() < 0.5:  # short contexts or long ones, or a token's own cost could not be told from its context's
            ready.reverse()
        prompts = [p for p in running if p.remaining_prompt > 0] + list(waiting)
        works = [Work(p.job.id, 1, self._level(level)) for p in ready[: min(batch, limits.tokens)]]
        room = limits.tokens - len(works)
        if prompts and room > 0 and (chunk or not works):
            size = min(chunk or limits.tokens, room, prompts[0].remaining_prompt)
            works.append(Work(prompts[0].job.id, size, self._level(level)))
        return works

    def _level(self, level: int | None) -> int:
        return self._random.choice(self._levels) if level is None else level

    def _shapes(self) -> Iterator[tuple[int, int, int | None]]:
        """(decodes, prompt tokens, level; None for a mixed one)."""
        while True:
            for batch in (0, *BATCHES):
                for level in (*self._levels, None):
                    yield batch, self._random.choice((16, 64, 128, 256, 512)) if batch in (0, 4, 16) else 0, level


def probe(engine: Engine, texts: Sequence[int], seconds: float = 4.0) -> CostModel:
    """Fit a cost model to steps of the running engine, which must be idle. texts: token ids to cut prompts from."""
    samples: list[StepSample] = []
    skipped = 0
    done = threading.Event()
    until = time.monotonic() + seconds

    def observe(step: Ran, took: float) -> None:
        nonlocal skipped
        if step.totals is None:
            return
        if skipped < WARM_UP:
            skipped += 1
            return
        samples.append(StepSample(step.totals, took))
        if time.monotonic() > until and len(samples) >= LEAST:
            done.set()

    errors: list[str] = []

    def heard(event: Event) -> None:
        if event.error is not None:
            errors.append(event.error)
            done.set()
        elif event.finish is not None and not done.is_set():
            launch()

    def launch() -> None:
        prompt = next(prompts)
        request = Request(Job(f"probe-{len(requests)}", 0.0, len(prompt), output), prompt, Sampling(), frozenset(), heard)
        requests.append(request)
        engine.submit(request)

    before, engine.observer = engine.observer, observe
    policy = engine.policy
    engine.replace_policy(Script(engine.ladder))
    requests: list[Request] = []
    count, room, output = _room(engine)
    prompts = _prompts(texts, room)
    for _ in range(count):
        launch()
    done.wait(timeout=max(60.0, 10 * seconds))
    for request in requests:
        engine.cancel(request.job.id)
    engine.replace_policy(policy)
    engine.observer = before
    if errors:
        raise PrismError(f"the model does not run: {errors[0]}", "see the log line of the failed step, or start with --debug")
    return CostModel.fit(layer_facts(engine.elastic), samples)


def _room(engine: Engine) -> tuple[int, int, int]:
    """(requests, longest prompt, generated tokens) that fit the context and the cache."""
    size, limit = engine.size, context_limit(engine.model) or 2048
    output = max(4, min(128, limit // 2, size.cache_tokens // 8))
    count = max(1, min(size.requests, max(BATCHES), size.cache_tokens // (2 * output)))
    return count, max(8, min(limit - output, 512, size.cache_tokens // count - output)), output


def _prompts(texts: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Pieces of the text of many lengths."""
    rng = random.Random(1)  # noqa: S311
    while True:
        length = rng.randint(max(1, longest // 8), longest)
        start = rng.randrange(max(1, len(texts) - length))
        yield list(texts[start : start + length])

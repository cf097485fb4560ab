"""The cost model of this machine: a few seconds of real steps, of several shapes and levels, before the first request."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..schedule.base import Job, Ladder, Limits, Policy, Progress, Work
from ..schedule.cost import CostModel, Sample
from .engine import Engine, layer_facts
from .requests import Event, Request, Sampling
from .scheduler import Step

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
        ready = [p for p in running if p.remaining_prompt <= 0]
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
    samples: list[Sample] = []
    skipped = 0
    done = threading.Event()
    until = time.monotonic() + seconds

    def observe(step: Step, took: float) -> None:
        nonlocal skipped
        if skipped < WARM_UP:
            skipped += 1
            return
        samples.append(Sample(step.totals, took))
        if time.monotonic() > until and len(samples) >= LEAST:
            done.set()

    def heard(event: Event) -> None:
        if event.error is not None:
            done.set()

    before, engine.observer = engine.observer, observe
    policy = engine.policy
    engine.replace_policy(Script(engine.ladder))
    requests = _requests(engine, texts, heard)
    for request in requests:
        engine.submit(request)
    done.wait(timeout=max(60.0, 10 * seconds))
    for request in requests:
        engine.cancel(request.job.id)
    engine.replace_policy(policy)
    engine.observer = before
    return CostModel.fit(layer_facts(engine.elastic), samples)


def _requests(engine: Engine, texts: Sequence[int], sink: Any) -> list[Request]:
    """Prompts of many lengths whose generation is long enough to outlast the probe."""
    size, rng = engine.size, random.Random(1)  # noqa: S311
    limit = context_limit(engine.model) or 2048
    output = min(1024, limit // 2)
    count = max(2, min(size.requests, max(BATCHES), size.cache_tokens // (2 * output)))
    room = max(8, min(limit - output, 512, size.cache_tokens // count - output))
    longest = [max(4, rng.randint(room // 8, room)) for _ in range(count)]
    starts = [rng.randrange(max(1, len(texts) - n)) for n in longest]
    prompts = [list(texts[s : s + n]) for s, n in zip(starts, longest, strict=True)]
    return [
        Request(Job(f"probe-{i}", 0.0, len(p), output), p, Sampling(), frozenset(), sink) for i, p in enumerate(prompts) if p
    ]


def context_limit(model: Any) -> int | None:
    """Tokens a sequence may have, if the model says."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None

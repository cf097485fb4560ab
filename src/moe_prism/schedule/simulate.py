"""Replays arrivals through a policy on an engine whose steps last what a cost model says. No engine, no clock, no randomness but the seed.

The engine keeps the contract of `base`: a request that is admitted holds a place and cache for its prompt and all of its output until it
ends; the step that completes a prompt also yields its first token. An answer that breaks the contract is a RuntimeError.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict, Unpack

import numpy as np

from ..forecast.step_cost import CostModel, Totals
from .base import Job, Ladder, Limits, Policy, Progress, Work
from .fill import ceiling
from .totals import step_totals
from .workloads import Arrival


@dataclass(frozen=True)
class SimulatedEngine:
    """Limits of the simulated engine."""

    requests: int = 64
    tokens: int = 512
    cache: int = 1 << 20  # tokens
    queue: int = 1 << 30  # waiting requests of one class; further ones are refused


@dataclass
class Served:
    """What became of one request. Times are seconds; None where the request did not get that far."""

    job: Job
    length: int
    refused: bool = False
    admitted: float | None = None
    first: float | None = None
    end: float | None = None
    tokens: int = 0  # computed, prompt and output
    quality_sum: float = 0.0  # of the level of every computed token

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.job.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for an answer of one token."""
        if self.first is None or self.end is None or self.length < 2:
            return None
        return (self.end - self.first) / (self.length - 1)

    @property
    def e2e(self) -> float | None:
        return None if self.end is None else self.end - self.job.arrival

    @property
    def quality(self) -> float | None:
        """Mean quality of the levels at which its tokens were computed."""
        return self.quality_sum / self.tokens if self.tokens else None

    @property
    def met(self) -> bool:
        """Finished, and within every target it has."""
        if self.end is None or self.ttft is None:
            return False
        in_time = self.job.ttft is None or self.ttft <= self.job.ttft + 1e-9
        return in_time and (self.job.tpot is None or self.tpot is None or self.tpot <= self.job.tpot + 1e-9)


@dataclass(frozen=True)
class SimulatedStep:
    """One step of a run, for plots."""

    start: float
    seconds: float
    prefill: int
    decode: int
    waiting: int
    quality: float  # mean over its tokens


@dataclass
class SimulatedRun:
    """A replay: every request's fate and every step."""

    results: list[Served]
    steps: list[SimulatedStep] = field(default_factory=list)
    end: float = 0.0


class _State:
    """Requests on the engine."""

    def __init__(self, engine: SimulatedEngine, ladder: Ladder) -> None:
        self.engine, self.ladder = engine, ladder
        self.waiting: list[Progress] = []
        self.running: list[Progress] = []
        self.queued: Counter[str] = Counter()
        self.results: dict[str, Served] = {}
        self.free_cache = engine.cache

    def arrive(self, arrival: Arrival) -> None:
        job = arrival.job
        result = self.results[job.id] = Served(job, arrival.length)
        if self.queued[job.kind] >= self.engine.queue or job.prompt + job.output > self.engine.cache:
            result.refused = True
        else:
            self.waiting.append(Progress(job))
            self.queued[job.kind] += 1

    def limits(self) -> Limits:
        return Limits(self.engine.requests, self.engine.tokens, self.free_cache)

    def admit(self, works: Sequence[Work], now: float) -> None:
        wanted = {work.id for work in works} - {p.job.id for p in self.running}
        if not wanted:
            return
        for progress in [p for p in self.waiting if p.job.id in wanted]:
            self.running.append(progress)
            self.queued[progress.job.kind] -= 1
            self.free_cache -= progress.job.prompt + progress.job.output
            self.results[progress.job.id].admitted = now
        self.waiting = [p for p in self.waiting if p.job.id not in wanted]
        if len(self.running) > self.engine.requests or self.free_cache < 0:
            raise RuntimeError("the policy admitted more than the engine can hold")

    def advance(self, works: Sequence[Work], end: float) -> None:
        """Every part of the step is done at `end`."""
        by_id = {work.id: work for work in works}
        after = []
        for progress in self.running:
            work = by_id.get(progress.job.id)
            moved = progress if work is None else self._move(progress, work, end)
            if moved is not None:
                after.append(moved)
        self.running = after

    def _move(self, progress: Progress, work: Work, end: float) -> Progress | None:
        """The request after its part; None if that was its last."""
        job, result = progress.job, self.results[progress.job.id]
        self._check(progress, work)
        result.tokens += work.tokens
        result.quality_sum += work.tokens * self.ladder.levels[work.level].quality
        decoding = progress.remaining_prompt <= 0
        computed = progress.computed + (0 if decoding else work.tokens)
        generated = progress.generated + (1 if decoding or computed == job.prompt else 0)
        if generated and result.first is None:
            result.first = end
        if generated >= result.length:
            result.end = end
            self.free_cache += job.prompt + job.output
            return None
        return Progress(job, computed, generated, result.first, work.level)

    def _check(self, progress: Progress, work: Work) -> None:
        job = progress.job
        most = progress.remaining_prompt if progress.remaining_prompt > 0 else 1
        if not job.floor <= work.level <= ceiling(job, self.ladder):
            raise RuntimeError(f"level {work.level} of request {job.id} is outside {job.floor}..{ceiling(job, self.ladder)}")
        if not 1 <= work.tokens <= most:
            raise RuntimeError(f"{work.tokens} tokens for request {job.id}, which can take {most}")


class Uncertainty(TypedDict, total=False):
    """What a policy cannot know of a step's time.

    noise: standard deviation of the log of a random factor on each step, drawn by seed. believed: the model the policy predicts with;
    it is told every step's time.
    """

    noise: float
    seed: int
    believed: CostModel | None


class _StepTimes(NamedTuple):
    """What steps last, and the model that is told."""

    cost: CostModel
    noise: float
    random: np.random.Generator
    believed: CostModel | None

    def of(self, totals: Totals) -> float:
        """Seconds of a step."""
        seconds = self.cost.seconds(totals) * (math.exp(self.noise * self.random.standard_normal()) if self.noise else 1.0)
        if self.believed is not None:
            self.believed.observe(totals, seconds)
        return seconds


def simulate(
    arrivals: Iterable[Arrival],
    policy: Policy,
    cost: CostModel,
    ladder: Ladder,
    engine: SimulatedEngine | None = None,
    until: float = math.inf,
    **uncertain: Unpack[Uncertainty],
) -> SimulatedRun:
    """Replay until all are done or the clock passes `until`. cost: what steps really last."""
    queue = deque(sorted(arrivals, key=lambda a: a.job.arrival))
    state = _State(engine or SimulatedEngine(), ladder)
    steps: list[SimulatedStep] = []
    noise, seed, believed = uncertain.get("noise", 0.0), uncertain.get("seed", 0), uncertain.get("believed")
    times = _StepTimes(cost, noise, np.random.default_rng(seed), believed)
    now = queue[0].job.arrival if queue else 0.0
    while now < until:
        while queue and queue[0].job.arrival <= now:
            state.arrive(queue.popleft())
        works = policy.step(now, state.waiting, state.running, state.limits()) if state.waiting or state.running else []
        if not works:
            if not queue and not state.waiting and not state.running:
                break
            now = _next(policy, now, queue, bool(state.waiting or state.running))
            continue
        step, seconds = _execute(state, works, now, times)
        steps.append(step)
        now += seconds
    for arrival in queue:
        state.arrive(arrival)
    return SimulatedRun(list(state.results.values()), steps, now)


def _execute(state: _State, works: Sequence[Work], now: float, times: _StepTimes) -> tuple[SimulatedStep, float]:
    ids = {work.id for work in works}
    if len(ids) != len(works) or sum(work.tokens for work in works) > state.engine.tokens:
        raise RuntimeError("the policy gave a request twice, or more tokens than a step takes")
    state.admit(works, now)
    by_id = {p.job.id: p for p in state.running if p.job.id in ids}
    if len(by_id) != len(works):
        raise RuntimeError("the policy gave work to a request that is not there")
    totals = step_totals(times.cost.facts, ((by_id[work.id], work) for work in works), state.ladder)
    seconds = times.of(totals)
    state.advance(works, now + seconds)
    tokens = totals.prefill + totals.decode
    quality = sum(work.tokens * state.ladder.levels[work.level].quality for work in works) / tokens
    return SimulatedStep(now, seconds, int(totals.prefill), int(totals.decode), len(state.waiting), quality), seconds


def _next(policy: Policy, now: float, queue: deque[Arrival], stuck: bool) -> float:
    """When something can happen again."""
    moments = [queue[0].job.arrival] if queue else []
    wake = policy.wake(now)
    if wake is not None:
        moments.append(max(wake, now))
    if not moments or (stuck and not queue and wake is None):
        raise RuntimeError("the policy does nothing though requests wait, and never wants to be asked again")
    return max(min(moments), math.nextafter(now, math.inf))

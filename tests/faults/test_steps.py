"""Faults S10, S18, S19 and D02: what an engine's tokens may not depend on."""

from __future__ import annotations

import random
import time

import pytest
import torch

pytest.importorskip("fastapi")

import moe_prism
from moe_prism.artefact.load import load
from moe_prism.point import FULL
from moe_prism.schedule.base import Ladder, Level, Work
from tests.serve.test_engine import NEW, Plain, Waves

LADDER = Ladder(
    (
        Level("half", FULL.with_budget(0.5), 4, 0.8),
        Level("most", FULL.with_budget(0.75), 6, 0.9),
        Level("full", FULL, 8, 1.0),
    )
)

TEXTS = ("import os\n\ndef main(", "class A:\n    def b(self", "for i in range(10):\n" * 2, "x =")
LONG = 60  # new tokens of the request that is stopped


@pytest.fixture(scope="module")
def tiny(elastic_tiny):
    """(model, prompts, greedy tokens of each prompt at each level, alone)."""
    model, tokenizer = load(elastic_tiny)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return model, prompts, [[switched(model, prompt, [level] * NEW) for prompt in prompts] for level in range(3)]


@pytest.fixture
def waves(tiny):
    made = Waves(tiny[0], LADDER)
    yield made
    made.engine.stop()


class Recorded(Plain):
    """Keeps how many tokens of which request it had computed."""

    def __init__(self):
        self.done: dict[str, int] = {}

    def step(self, now, waiting, running, limits):
        works = self.choose(now, waiting, running, limits)
        for work in works:
            self.done[work.id] = self.done.get(work.id, 0) + work.tokens
        return works

    def choose(self, now, waiting, running, limits):
        return super().step(now, waiting, running, limits)


class UrgentFirst(Recorded):
    """A long request stands still while there are others."""

    stopped = 0  # steps

    def choose(self, now, waiting, running, limits):
        works = super().choose(now, waiting, running, limits)
        long = {p.job.id for p in (*waiting, *running) if p.job.output == LONG}
        others = [w for w in works if w.id not in long]
        self.stopped += bool(others) and any(p.job.id in long for p in running)
        return others or works


def test_s10_a_request_that_was_stopped_goes_on_without_computing_anything_again(tiny, waves):
    _, prompts, reference = tiny
    alone = waves.run([prompts[0]], [2], new=LONG)[0][0]
    policy = UrgentFirst()
    waves.engine.replace_policy(policy)
    heard: list = []
    long = waves.submit(prompts[0], 2, new=LONG, heard=heard.append)
    until = time.monotonic() + 60
    for _ in range(3):
        while len(heard) < 5 and time.monotonic() < until:
            time.sleep(0.002)
        assert waves.tokens(prompts[1:], [2] * 3) == reference[2][1:]
    while not (heard and heard[-1].finish) and time.monotonic() < until:
        time.sleep(0.01)
    assert [e.token for e in heard if e.token is not None] == alone and long.job.id not in waves.engine.book
    assert policy.stopped > 0
    computed = policy.done[long.job.id]
    assert computed + long.cached_tokens == len(prompts[0]) + LONG - 1


class Switching(Recorded):
    """Another operating point every step, for everybody."""

    def __init__(self):
        super().__init__()
        self.steps, self.seen = 0, dict[str, list[int]]()

    def choose(self, now, waiting, running, limits):
        self.steps += 1
        works = super().choose(now, waiting, running, limits)
        for work in works:
            self.seen.setdefault(work.id, []).append(self.steps)
        number = {
            name: i for i, name in enumerate(self.seen)
        }  # not the place in the batch: it falls by one as often as others end
        return [Work(w.id, w.tokens, (self.steps + number[w.id]) % 3) for w in works]


def switched(model, prompt, levels):
    """Greedy tokens where step i runs at levels[i]."""
    ids, cache, out = torch.tensor([prompt]), None, []
    for level in levels:
        with torch.no_grad(), moe_prism.operating_point(model, point=LADDER.levels[level].point):
            said = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, token = said.past_key_values, int(said.logits[0, -1].argmax())
        out.append(token)
        ids = torch.tensor([[token]])
    return out


def test_s18_points_may_change_every_step(tiny):
    model, prompts, _ = tiny
    waves = Waves(model, LADDER, prefix_cache=False)
    try:
        policy = Switching()
        waves.engine.replace_policy(policy)
        results = [waves.run_free(prompts) for _ in range(2)]
    finally:
        waves.engine.stop()
    for wave in results:
        for prompt, (tokens, events, _) in zip(prompts, wave, strict=True):
            levels = [e.level for e in events if e.token is not None]
            assert len(set(levels)) == 3 and tokens == switched(model, prompt, levels)
    assert all(steps == [*range(steps[0], steps[0] + NEW)] for steps in policy.seen.values())  # nobody missed one


@pytest.mark.parametrize("mixes", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_d02_tokens_are_the_same_in_every_mix(tiny, mixes):
    """Composition, order of arrival, levels and sizes of chunks are drawn; all must give the tokens of each request alone."""
    model, prompts, reference = tiny
    draw = random.Random(17)
    for step_tokens in (16, 33, 512):
        waves = Waves(model, LADDER, step_tokens=step_tokens, prefix_cache=step_tokens != 33)
        try:
            for _ in range(-(-mixes // 3)):
                chosen = [(draw.randrange(len(prompts)), draw.randrange(3)) for _ in range(draw.randint(1, 8))]
                found = waves.tokens([prompts[i] for i, _ in chosen], [level for _, level in chosen], new=4)
                assert found == [reference[level][i][:4] for i, level in chosen], chosen
        finally:
            waves.engine.stop()


def test_s19_a_jump_of_the_clock_changes_nothing(house, monkeypatch):
    """Deadlines and durations are of the clock that only goes on; the wall clock is told to clients and used for nothing."""
    import httpx2

    body = {"prompt": "def main(args):\n    return ", "max_tokens": 5, "temperature": 0}
    expected = httpx2.post(house.root + "/v1/completions", json=body, timeout=60).json()["choices"]
    real = time.time
    for jump in (-1e9, 86_400.0, 1e9):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda jump=jump: real() + jump)
            answer = httpx2.post(house.root + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["choices"] == expected
        assert abs(answer.json()["created"] - real() - jump) < 600
    for line in house.built.service.metrics.text().decode().splitlines():
        if "_seconds_sum" in line or "_seconds_count" in line:
            assert float(line.rsplit(" ", 1)[1]) >= 0, line

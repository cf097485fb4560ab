"""The engine against transformers' own generate, and requests against each other."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import moe_prism
from moe_prism.model import load_tokenizer
from moe_prism.point import FULL
from moe_prism.schedule.base import Job, Ladder, Level, Policy, Work
from moe_prism.serve.engine.engine import Engine
from moe_prism.serve.engine.scheduler import PolicyScheduler
from moe_prism.serve.engine.size import EngineSize
from moe_prism.serve.requests import ErrorKind, Request, Sampling
from tests.faults.points import fault
from tests.tiers import by_night

LADDER = Ladder(
    (
        Level("low", FULL.with_budget(0.25), 4, 0.8),
        Level("half", FULL.with_budget(0.5), 8, 0.9),
        Level("full", FULL, 16, 1.0),
    )
)
TEXTS = ["import os\nimport sys\n\ndef main(", "class Foo:\n    def __init__(self, a, b):\n", "for i in range(10):\n" * 12, "x ="]
NEW = 12
LEFT_OUT = frozenset[int]()


class Plain(Policy):
    """In order of arrival, everyone at the floor."""

    def step(self, now, waiting, running, limits):
        works, left = [], limits.tokens
        for p in [*running, *waiting[: max(0, limits.requests - len(running))]]:
            size = min(left, p.remaining_prompt) if p.remaining_prompt else 1
            if left > 0:
                works.append(Work(p.job.id, size, p.job.floor))
                left -= size
        return works


class Waves:
    """Runs requests through an engine and gathers what their sinks hear."""

    def __init__(self, model, ladder=LADDER, drafting=None, **size):
        sizes = EngineSize(**{"requests": 8, "cache_tokens": 4096, "page": 16, **size})
        self.engine = Engine(model, ladder, Plain(), sizes, drafting=drafting)
        self.engine.start()
        self.count = 0

    def submit(self, prompt, level, new=NEW, sampling=None, stop=LEFT_OUT, heard=None, ceiling=None):
        self.count += 1
        job = Job(f"r{self.count}", time.monotonic(), len(prompt), new, level, level if ceiling is None else ceiling)
        request = Request(job, prompt, sampling or Sampling(), stop, heard)
        self.engine.submit(request)
        return request

    def run(self, prompts, levels, new=NEW, samplings=None, ceiling=None):
        """[(tokens, events, request)] of all, run together."""
        ends, out = threading.Semaphore(0), []
        for i, (prompt, level) in enumerate(zip(prompts, levels, strict=True)):
            events = []

            def heard(event, events=events):
                events.append(event)
                if event.finish or event.error:
                    ends.release()

            sampling = samplings[i] if samplings else None
            out.append((events, self.submit(prompt, level, new, sampling, heard=heard, ceiling=ceiling)))
        for _ in out:
            assert ends.acquire(timeout=600)  # a machine that others use may take long; without an end the test hangs
        return [([e.token for e in events if e.token is not None], events, request) for events, request in out]

    def run_free(self, prompts):
        """At whatever levels the policy chooses."""
        return self.run(prompts, [0] * len(prompts), ceiling=2)

    def tokens(self, *args, **kwargs):
        return [tokens for tokens, _, _ in self.run(*args, **kwargs)]


@pytest.fixture(scope="module")
def nano(elastic_nano):
    model, tokenizer = moe_prism.load(elastic_nano)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]

    def reference(point):
        with moe_prism.operating_point(model, point=point):
            return [
                model.generate(
                    torch.tensor([p]),
                    attention_mask=torch.ones(1, len(p)),
                    max_new_tokens=NEW,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )[0, len(p) :]
                for p in prompts
            ]

    return model, prompts, [[row.tolist() for row in reference(level.point)] for level in LADDER.levels]


@pytest.fixture
def waves(nano):
    waves = Waves(nano[0])
    yield waves
    until = time.monotonic() + 5
    while waves.engine.check_integrity() and time.monotonic() < until:
        time.sleep(0.01)
    assert waves.engine.check_integrity() == []
    waves.engine.stop()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_greedy_tokens_are_those_of_generate(nano, waves, level):
    _, prompts, reference = nano
    assert waves.tokens(prompts, [level] * 4) == reference[level]


def test_d02_requests_of_different_levels_in_one_batch_equal_running_alone(nano, waves):
    _, prompts, reference = nano
    levels = [0, 2, 1, 2]
    results = waves.run(prompts, levels)
    assert [tokens for tokens, _, _ in results] == [reference[level][i] for i, level in enumerate(levels)]
    assert [list(request.levels) for _, _, request in results] == [[level] for level in levels]
    assert all(e.level == level for (_, events, _), level in zip(results, levels, strict=True) for e in events)


@pytest.mark.parametrize("step_tokens", by_night([16, 33], 33))
def test_d02_prompts_in_chunks_give_the_same_tokens(nano, step_tokens):
    model, prompts, reference = nano
    waves = Waves(model, step_tokens=step_tokens, prefix_cache=False)
    try:
        assert waves.tokens(prompts, [2] * 4) == reference[2]
        assert waves.tokens(prompts, [1, 0, 1, 0]) == [reference[1][0], reference[0][1], reference[1][2], reference[0][3]]
    finally:
        waves.engine.stop()


def test_a_held_budget_knows_nothing_of_chunks_of_others_and_of_the_prefix_cache(nano, elastic_nano, text_file):
    """Log-probabilities of what a request draws: alone, after a prefix hit, in chunks, beside others, after its blocks were given up."""
    model, prompts, _ = nano
    ids = load_tokenizer(elastic_nano)(text_file.read_text()[3000:5000])["input_ids"][:150]
    seen = Sampling(logprobs=1)

    def drawn(waves, beside=()):
        everyone = [ids, *beside]
        tokens, events, request = waves.run(everyone, [1] * len(everyone), samplings=[seen] * len(everyone))[0]
        return tokens, torch.tensor([e.logprob.logprob for e in events if e.token is not None]), request.cached_tokens

    alone = []

    def check(found, cached):
        alone.append(found)
        assert found[0] == alone[0][0] and (found[2] > 0) == cached
        torch.testing.assert_close(found[1], alone[0][1], rtol=1e-3, atol=1e-3)

    for size in ({"cache_tokens": 512}, {"step_tokens": 23, "cache_tokens": 512}):
        waves = Waves(model, **size)
        try:
            check(drawn(waves), False)
            check(drawn(waves), True)
            check(drawn(waves, beside=prompts), True)
            for i in range(4):  # every one of them differs from its first token on, so the blocks are needed for others
                waves.tokens([[i + 10, *ids[1:]]], [1])
            check(drawn(waves), False)
        finally:
            waves.engine.stop()


def test_stock_attention_gives_the_same_tokens(nano, monkeypatch):
    model, prompts, reference = nano
    monkeypatch.setattr("moe_prism.serve.engine.engine.full_attention", lambda model: False)
    waves = Waves(model)
    try:
        assert model.config._attn_implementation == "sdpa"
        assert waves.tokens(prompts, [2, 0, 2, 0]) == [reference[2][0], reference[0][1], reference[2][2], reference[0][3]]
    finally:
        waves.engine.stop()


def test_the_prefix_cache_keeps_levels_apart(nano, waves):
    _, prompts, reference = nano
    long = prompts[2]
    first = waves.run([long], [2])[0]
    again = waves.run([long], [2])[0]
    other = waves.run([long], [0])[0]
    assert [r.cached_tokens for _, _, r in (first, again, other)] == [0, (len(long) - 1) // 16 * 16, 0]
    assert [t for t, _, _ in (first, again, other)] == [reference[2][2], reference[2][2], reference[0][2]]
    assert waves.run([long], [0])[0][2].cached_tokens > 0


def test_a_full_cache_gives_up_prefixes_before_requests(nano):
    model, prompts, reference = nano
    waves = Waves(model, cache_tokens=256)
    try:
        for i in range(6):  # every prompt differs from its first token on
            waves.tokens([[i + 10, *prompts[2][1:]]], [2])
        assert waves.tokens(prompts[:2], [2, 2]) == reference[2][:2]
    finally:
        waves.engine.stop()


def test_more_requests_than_the_cache_holds_all_finish(nano):
    model, prompts, reference = nano
    waves = Waves(model, cache_tokens=256, prefix_cache=False)
    try:
        assert waves.tokens(prompts * 3, [2] * 12) == reference[2] * 3
    finally:
        waves.engine.stop()


def test_a_seed_decides_the_tokens_whoever_shares_the_batch(nano, waves):
    _, prompts, _ = nano
    hot = Sampling(temperature=0.9, top_p=0.9, seed=7)
    alone = waves.tokens([prompts[0]], [2], samplings=[hot])[0]
    crowd = waves.tokens([prompts[1], prompts[0], prompts[3]], [0, 2, 2], samplings=[Sampling(), hot, Sampling(1.0, seed=1)])
    other = waves.tokens([prompts[0]], [2], samplings=[Sampling(0.9, 0.9, seed=8)])[0]
    assert crowd[1] == alone != other


def test_prompt_logprobs_are_those_of_one_forward(nano):
    model, prompts, _ = nano
    with torch.no_grad(), moe_prism.operating_point(model, 1.0):
        log_p = model(torch.tensor([prompts[2]])).logits[0].float().log_softmax(-1)
    expected = log_p[:-1].gather(1, torch.tensor(prompts[2][1:])[:, None])[:, 0]
    waves = Waves(model, step_tokens=50)  # in several chunks
    try:
        _, events, _ = waves.run([prompts[2]], [2], new=1, samplings=[Sampling(logprobs=2, prompt_logprobs=2)])[0]
    finally:
        waves.engine.stop()
    entries = [entry for event in events for entry in event.prompt]
    assert [e.token for e in entries] == prompts[2] and entries[0].logprob is None
    assert torch.allclose(torch.tensor([e.logprob for e in entries[1:]]), expected, atol=1e-4)
    assert all(len(e.top) == 2 and e.top[0][1] >= e.top[1][1] for e in entries[1:])


def test_a_stop_token_ends_a_request(nano, waves):
    _, prompts, reference = nano
    heard, ended = [], threading.Event()
    stop = reference[2][0][3]
    waves.submit(prompts[0], 2, stop=frozenset({stop}), heard=lambda e: (heard.append(e), e.finish and ended.set()))
    assert ended.wait(20)
    at = reference[2][0].index(stop)
    assert [e.token for e in heard] == reference[2][0][: at + 1] and heard[-1].finish == "stop"


def test_s04_cancelling_frees_everything(nano, waves):
    _, prompts, _ = nano
    began = threading.Event()
    requests = [waves.submit(p, 2, new=400, heard=lambda e: began.set()) for p in prompts]
    assert began.wait(20)
    for request in requests:
        waves.engine.cancel(request.job.id)  # the fixture checks what is left


def test_s11_a_row_that_is_not_finite_ends_alone(nano, waves):
    _, prompts, reference = nano

    def poison(runner, parts, spans, logits):
        for row, part in enumerate(p for p in parts if p.yields):
            if list(part.request.tokens) == prompts[1] and part.request.track.generated == 2:
                logits[row] = float("nan")

    waves.run(prompts[:1], [2])
    with fault("logits", poison):
        results = waves.run(prompts, [2] * 4)
    assert results[1][1][-1].error and "not finite" in results[1][1][-1].error and len(results[1][0]) == 2
    assert results[1][1][-1].kind is ErrorKind.NOT_FINITE
    assert [results[i][0] for i in (0, 2, 3)] == [reference[2][i] for i in (0, 2, 3)]


def test_a_failing_step_ends_its_requests_and_no_others(nano, waves):
    _, prompts, reference = nano

    def explode(runner, parts, spans, logits):
        if any(list(p.request.tokens) == prompts[0] for p in parts):
            raise MemoryError("injected")

    waves.run(prompts[1:2], [2])
    with fault("logits", explode):
        failed = waves.run(prompts[:1], [2])[0]
        assert failed[1][-1].error == "the step failed: MemoryError" and waves.engine.failed_steps == 1
        assert waves.tokens(prompts[1:], [2] * 3) == reference[2][1:]


def test_s04_requests_cancelled_as_they_arrive_are_gone(nano, waves):
    _, prompts, reference = nano
    heard = []
    for i in range(300):
        request = waves.submit(prompts[3], 2, new=200, heard=heard.append)
        if i % 7:
            time.sleep(0)
        waves.engine.cancel(request.job.id)
    assert waves.tokens(prompts[:2], [2, 2]) == reference[2][:2]
    assert waves.engine.failed_steps == 0 and not any(e.finish or e.error for e in heard)


def test_an_engine_that_stops_ends_every_request_and_takes_no_more(nano):
    model, prompts, _ = nano
    waves = Waves(model)

    class Broken(Plain):
        def step(self, *args):
            raise ZeroDivisionError

    waves.engine.replace_policy(Broken())
    (result,) = waves.run(prompts[:1], [2])
    assert result[1][-1].error == "the engine stopped"
    until = time.monotonic() + 10
    while waves.engine.alive and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(moe_prism.errors.PrismError, match="stopped"):
        waves.submit(prompts[0], 2, heard=lambda e: None)
    waves.engine.stop()


def test_s21_an_id_in_use_is_refused(nano, waves):
    _, prompts, _ = nano
    request = waves.submit(prompts[0], 2, new=300, heard=lambda e: None)
    with pytest.raises(moe_prism.errors.UsageError, match="in use"):
        waves.engine.submit(request)
    waves.engine.cancel(request.job.id)
    waves.engine.cancel("nobody")


def test_a_policy_is_replaced_even_while_the_thread_is_still_connecting(nano, monkeypatch):
    """The batch processor was published after its scheduler had taken the old policy: what came between was lost."""
    model, _, _ = nano
    engine, wanted = Engine(model, LADDER, Plain(), EngineSize(requests=2, cache_tokens=512, page=16)), Plain()
    connect = PolicyScheduler.connect

    def connected(scheduler, to):
        connect(scheduler, to)
        engine.replace_policy(wanted)

    monkeypatch.setattr(PolicyScheduler, "connect", connected)
    engine.start()
    try:
        until = time.monotonic() + 600
        while engine.manager.batch_processor is None and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.manager.batch_processor.scheduler.policy is wanted
    finally:
        engine.stop()

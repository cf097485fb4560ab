"""Requests of the engine that draft for themselves: the tokens are those of plain decoding."""

import threading
import time

import httpx2
import pytest

from moe_prism.errors import UsageError
from moe_prism.methods.decode.self_draft import SelfDraftParameters
from moe_prism.serve.requests import Sampling

from .house import open_house, with_levels
from .test_engine import Waves, nano  # noqa: F401

ASKS = Sampling(self_draft=True)
LONG = 40
HOT = {"temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def plain(nano):  # noqa: F811
    """What an engine without drafts gives. One engine at a time: they share the model."""
    kinds = {"repetition_penalty": 1.3, "logprobs": 2}
    waves = Waves(nano[0])
    found = {
        "full": waves.tokens(nano[1], [2] * 4, new=LONG),
        "half": waves.tokens(nano[1], [1] * 4, new=LONG),
        "hot": waves.tokens(nano[1], [2] * 4, new=LONG, samplings=[Sampling(**HOT, seed=i) for i in range(4)]),
        "shaped": waves.run(nano[1][:2], [2] * 2, new=LONG, samplings=[Sampling(**kinds)] * 2),
    }
    found["again"] = waves.tokens([[*nano[1][0], *found["full"][0]]], [2], new=LONG)
    waves.engine.stop()
    return found


@pytest.fixture
def drafting(nano, plain, request):  # noqa: F811
    budget, length, adapt = getattr(request, "param", (0.5, 3, False))
    waves = Waves(nano[0], drafting=SelfDraftParameters(budget=budget, length=length, adapt=adapt))
    yield waves
    until = time.monotonic() + 5
    while waves.engine.check_integrity() and time.monotonic() < until:
        time.sleep(0.01)
    assert waves.engine.check_integrity() == [] and not waves.engine.drafts.open
    waves.engine.stop()


@pytest.mark.parametrize(
    "drafting",
    [
        pytest.param(each, marks=() if each[2] else pytest.mark.slow)
        for each in ((0.25, 4, False), (0.5, 1, False), (0.25, 3, True))
    ],
    indirect=True,
)
def test_one_and_four_requests_give_the_tokens_of_plain_decoding(nano, plain, drafting):  # noqa: F811
    wanted = plain["full"]
    assert drafting.tokens(nano[1], [2] * 4, new=LONG, samplings=[ASKS] * 4) == wanted
    for prompt, own in zip(nano[1], wanted, strict=True):
        assert drafting.tokens([prompt], [2], new=LONG, samplings=[ASKS]) == [own]
    assert drafting.engine.drafts.asked.adapt or drafting.engine.drafts.drafted > 20


def test_drawn_tokens_are_those_of_the_same_seed(nano, plain, drafting):  # noqa: F811
    asks = [Sampling(**HOT, seed=i, self_draft=True) for i in range(4)]
    assert drafting.tokens(nano[1], [2] * 4, new=LONG, samplings=asks) == plain["hot"]
    assert drafting.engine.drafts.kept > 0.4 * drafting.engine.drafts.drafted


def test_beside_requests_that_do_not_draft_and_run_at_other_levels(nano, plain, drafting):  # noqa: F811
    full, half = plain["full"], plain["half"]
    found = drafting.run(nano[1], [2, 1, 2, 1], new=LONG, samplings=[ASKS, ASKS, Sampling(), Sampling()])
    assert [tokens for tokens, _, _ in found] == [full[0], half[1], full[2], half[3]]
    assert [list(request.levels) for _, _, request in found] == [[2], [1], [2], [1]]


def test_levels_and_tokens_are_counted_as_without_drafts(nano, plain, drafting):  # noqa: F811
    (tokens, events, request), *_ = drafting.run(nano[1][:1], [2], new=LONG, samplings=[ASKS])
    assert sum(request.levels.values()) == len(nano[1][0]) + LONG - 1
    assert request.track.generated == len(tokens) == LONG and events[-1].finish == "length"


@pytest.mark.slow
def test_what_a_check_computed_is_offered_as_a_prefix(nano, plain, drafting):  # noqa: F811
    """The next request begins with the whole answer of the first, and finds it in the cache."""
    (tokens,) = drafting.tokens(nano[1][:1], [2], new=LONG, samplings=[ASKS])
    prompt = [*nano[1][0], *tokens]
    ((again, _, request),) = drafting.run([prompt], [2], new=LONG, samplings=[ASKS])
    assert request.cached_tokens >= len(prompt) // 16 * 16 - 16
    assert plain["again"] == [again]


def test_an_end_token_within_a_draft_ends_the_answer(nano, plain, drafting):  # noqa: F811
    wanted = plain["full"][0]
    end = wanted[9]
    first = wanted.index(end)
    heard = []
    done = threading.Event()

    def hear(event):
        heard.append(event)
        if event.finish or event.error:
            done.set()

    drafting.submit(nano[1][0], 2, LONG, ASKS, frozenset({end}), hear)
    assert done.wait(60)
    assert [e.token for e in heard if e.token is not None] == wanted[: first + 1] and heard[-1].finish == "stop"


@pytest.mark.slow
def test_penalties_and_logprobs_go_on(nano, plain, drafting):  # noqa: F811
    kinds = {"repetition_penalty": 1.3, "logprobs": 2}
    found = drafting.run(nano[1][:2], [2] * 2, new=LONG, samplings=[Sampling(**kinds, self_draft=True)] * 2)
    for (tokens, events, _), (own, before, _) in zip(found, plain["shaped"], strict=True):
        assert tokens == own
        pairs = [(a.logprob.logprob, b.logprob.logprob) for a, b in zip(events, before, strict=True) if a.token is not None]
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in pairs) and len(pairs) == LONG


@pytest.mark.parametrize(
    ("drafting", "loses"),
    [((0.5, 4, True), True), pytest.param((0.5, 4, True), False, marks=pytest.mark.slow)],
    indirect=["drafting"],
)
def test_it_switches_itself_off_where_it_loses(nano, plain, drafting, loses):  # noqa: F811
    """The seconds of a machine where a check takes as long as its tokens alone do, and of one where it takes one step's."""
    drafts, observe = drafting.engine.drafts, drafting.engine.drafts.observe
    made = []

    def told(parts, seconds):
        drawn = [count for _, _, count in parts]
        drafted = all(draft is not None for draft, _, _ in parts)
        checks = drafted and all(drawn)
        made.append("check" if checks else "guess" if drafted else "plain")
        wanted = max((draft.wanted for draft, _, _ in parts if draft is not None), default=0)
        observe(parts, (wanted + 1.0 if loses else 1.1) if checks else 0.2 if drafted else 1.0)

    drafts.observe = told
    for _ in range(3):
        assert drafting.tokens(nano[1][:1], [2], new=LONG, samplings=[ASKS]) == plain["full"][:1]
    checks = made.count("check")
    assert checks <= 6 if loses else checks > made.count("plain")


def test_a_request_that_does_not_ask_never_drafts(nano, plain, drafting):  # noqa: F811
    assert drafting.tokens(nano[1], [2] * 4, new=LONG) == plain["full"]
    assert drafting.engine.drafts.drafted == 0


def test_requests_draft_where_the_server_does_and_may_say_no(elastic_tiny, tmp_path):
    folder = with_levels(elastic_tiny, tmp_path / "tiny")
    body = {"model": "tiny", "prompt": "import os", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "quality": 1.0}
    told = []
    for drafting in (None, "budget=0.5:length=2:adapt=false"):
        with open_house(folder, self_draft=drafting) as house:
            for more in ({}, {"self_draft": False}, {"self_draft": True}):
                answer = httpx2.post(f"{house.url}/completions", json=body | more, timeout=60)
                if drafting is None and more.get("self_draft"):
                    assert answer.status_code == 400 and "--self-draft" in answer.json()["error"]["message"]
                    continue
                assert answer.json()["usage"]["completion_tokens"] == 24
                told.append(answer.json()["choices"][0]["text"])
            metrics = httpx2.get(f"{house.root}/metrics").text
            drafted = [line for line in metrics.splitlines() if line.startswith("moe_prism:spec_decode_num_draft_tokens_total")]
            assert (float(drafted[0].split()[-1]) > 0) == (drafting is not None)
    assert len(set(told)) == 1


def test_a_draft_that_says_nothing_is_refused_before_the_model_is_loaded(elastic_tiny):
    with pytest.raises(UsageError, match="outside"), open_house(elastic_tiny, self_draft="2"):
        pass

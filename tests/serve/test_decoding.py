"""Requests with a method of decoding, or with a fitted router, beside the batch: tokens of `generate`, and neighbours undisturbed."""

import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
import torch

from moe_prism.jobs.generate import generate
from moe_prism.methods.decode.base import DecodeRun, ended
from moe_prism.methods.decode.run import asked_decoding, decoder_of
from moe_prism.options.generate import GenerateOptions, TunedOptions
from moe_prism.point import FULL, OperatingPoint
from moe_prism.serve.config import Config
from moe_prism.serve.engine.decoding import DecodingOffer, _Shaped
from moe_prism.serve.engine.engine import Engine
from moe_prism.serve.engine.size import EngineSize
from moe_prism.serve.http.decoding import check_decoding
from moe_prism.serve.http.protocol import CompletionRequest
from moe_prism.serve.http.refusal import Refusal
from moe_prism.serve.requests import ErrorKind, Sampling
from tests.tiers import by_night

from .house import open_house, with_levels
from .test_engine import LADDER, TEXTS, Plain, Waves, nano  # noqa: F401

NEW = 24
SCMOE, CONCISE = "scmoe:beta=0.9", "concise:threshold=0.2:end=\n:sure=import:unsure=def:close=\n"
DES = "des:beams=4:keep=2"
HOT = {"temperature": 0.8, "top_p": 0.95, "seed": 5}
EVERY = ("scmoe", "des", "concise", "rewiring")


def liked(prompt, text):
    """A verifier that any text can please."""
    return float(text.count("e")) - text.count("s")


class DecodingWaves(Waves):
    def __init__(self, model, tokenizer, verifier=liked, **size):
        sizes = EngineSize(**{"requests": 8, "cache_tokens": 4096, "page": 16, **size})
        self.engine = Engine(model, LADDER, Plain(), sizes, tokenizer=tokenizer, decoding=DecodingOffer(EVERY, verifier))
        self.engine.start()
        self.count = 0


@pytest.fixture(scope="module")
def tokenizer(elastic_nano):
    from moe_prism.model import load_tokenizer

    return load_tokenizer(elastic_nano)


@pytest.fixture(scope="module")
def wanted(nano, tokenizer):  # noqa: F811
    """What `generate` and the methods by themselves give. Before an engine has the model: its attention is of a batch then."""
    model, prompts, _ = nano

    def made(text, **how):
        one = generate(model, tokenizer, text, sampling=GenerateOptions(max_tokens=NEW), **how)
        return one.text, one.tokens, one.rewired

    return {
        "longest": max(prompts, key=len) * 3,
        "in chunks": alone(model, tokenizer, max(prompts, key=len) * 3, SCMOE, new=8),
        "rewired": made(TEXTS[0], tuned=TunedOptions(rewire=4)),
        **{("greedy", a): [made(t, point=OperatingPoint(decoding=asked_decoding(a))) for t in TEXTS] for a in (SCMOE, CONCISE)},
        **{("hot", a): [alone(model, tokenizer, p, a, Sampling(**HOT)) for p in prompts[:2]] for a in (SCMOE, DES, CONCISE)},
    }


@pytest.fixture
def waves(nano, tokenizer, wanted, request):  # noqa: F811
    made = DecodingWaves(nano[0], tokenizer, **getattr(request, "param", {}))
    yield made
    until = time.monotonic() + 5
    while made.engine.check_integrity() and time.monotonic() < until:
        time.sleep(0.01)
    assert made.engine.check_integrity() == []
    made.engine.stop()


def alone(model, tokenizer, prompt, asked, sampling=None, new=NEW):
    """Tokens of the method by itself, with the processors and the random numbers that a server has."""
    sampling = sampling or Sampling()
    elastic = model._moe_prism
    run = DecodeRun(
        model=model,
        tokenizer=tokenizer,
        elastic=elastic,
        point=FULL,
        prompt=prompt,
        shaped=_Shaped(sampling, len(prompt), frozenset()),
        ended=lambda ids: ids.shape[1] >= len(prompt) + new,
        samples=sampling.temperature > 0,
        heard=lambda token: None,
        verifier=liked,
        generator=torch.Generator().manual_seed(sampling.seed or 0),
    )
    made = ended(decoder_of(elastic, OperatingPoint(decoding=asked_decoding(asked))).steps(run))
    return made.tokens[len(prompt) :]


@pytest.mark.parametrize("asked", by_night([SCMOE, CONCISE], SCMOE))
def test_greedy_tokens_are_those_of_generate(nano, tokenizer, wanted, waves, asked):  # noqa: F811
    prompts = nano[1]
    found = waves.run(prompts, [2] * 4, new=NEW, samplings=[Sampling(decode=asked)] * 4)
    for (text, count, _), (tokens, events, _) in zip(wanted["greedy", asked], found, strict=True):
        assert tokenizer.decode(tokens[:count], skip_special_tokens=True) == text  # these requests have no end token
        assert events[-1].facts["method"] == asked.partition(":")[0] and events[-1].facts["forwards"] >= len(tokens)
    assert asked != SCMOE or [tokens for tokens, _, _ in found] != waves.tokens(prompts, [2] * 4, new=NEW)


@pytest.mark.parametrize(
    "asked", [pytest.param(SCMOE, marks=pytest.mark.slow), DES, pytest.param(CONCISE, marks=pytest.mark.slow)]
)
def test_drawn_tokens_follow_the_seed_and_neighbours_are_as_they_were(nano, wanted, waves, asked):  # noqa: F811
    prompts = nano[1]
    usual = waves.tokens(prompts, [2, 1, 2, 0], new=NEW)
    ask = Sampling(**HOT, decode=asked)
    both = waves.tokens([*prompts, *prompts[:2]], [2, 1, 2, 0, 2, 2], new=NEW, samplings=[*[Sampling()] * 4, ask, ask])
    assert both[:4] == usual and both[4:] == wanted["hot", asked]


@pytest.mark.parametrize("waves", [{"step_tokens": 16}], indirect=True)
def test_a_long_prompt_is_computed_in_chunks(wanted, waves):
    found = waves.tokens([wanted["longest"]], [2], new=8, samplings=[Sampling(decode=SCMOE)])
    assert found == [wanted["in chunks"]]


def test_a_fitted_router_is_forgotten_behind_its_request(nano, tokenizer, wanted, waves):  # noqa: F811
    """It answers as `generate --rewire` does; who runs beside it, and who comes later, gets the tokens of the model."""
    model, prompts, _ = nano
    usual = waves.tokens(prompts, [2] * 4, new=NEW)
    asks = [Sampling(rewire=4), *[Sampling()] * 4]
    ((tokens, events, _), *others) = waves.run([prompts[0], *prompts], [2] * 5, new=NEW, samplings=asks)
    text, count, facts = wanted["rewired"]
    assert tokenizer.decode(tokens[:count], skip_special_tokens=True) == text
    assert events[-1].facts["rewired"] == facts and [own for own, _, _ in others] == usual
    assert waves.tokens(prompts, [2] * 4, new=NEW) == usual
    assert len({p.requires_grad for p in model.parameters()}) == 1


def test_levels_count_prompt_and_answer_once(nano, waves):  # noqa: F811
    ((tokens, events, request),) = waves.run(nano[1][:1], [2], new=NEW, samplings=[Sampling(decode=SCMOE)])
    assert request.levels == {2: len(nano[1][0]) + NEW - 1} and len(tokens) == NEW and events[-1].finish == "length"
    assert events[-1].facts["forwards"] == 2 * NEW


@pytest.mark.parametrize("waves", [{"decoding": 1}], indirect=True)
def test_one_waits_for_the_other_and_a_client_that_leaves_frees_its_place(nano, waves):  # noqa: F811
    heard, first = threading.Event(), threading.Event()
    gone = waves.submit(nano[1][0], 2, 400, Sampling(decode=SCMOE), heard=lambda event: first.set())
    waves.submit(nano[1][1], 2, 4, Sampling(decode=SCMOE), heard=lambda event: event.finish and heard.set())
    assert first.wait(60) and waves.engine.gauges().waiting == 1
    assert not heard.is_set()
    waves.engine.cancel(gone.job.id)
    assert heard.wait(60)


def test_what_cannot_be_done_is_refused_before_anything_runs(nano, waves):  # noqa: F811
    from moe_prism.errors import UsageError

    for sampling, said in (
        (Sampling(decode="self-draft:0.5"), "decode by 'self-draft'"),
        (Sampling(decode="scmoe:rank=9"), "none of rank 9"),
        (Sampling(decode="des:beams=200"), "cache_tokens"),
    ):
        with pytest.raises(UsageError, match=said):
            waves.submit(nano[1][0], 2, NEW, sampling, heard=lambda event: None)
    with pytest.raises(UsageError, match="held"):
        waves.submit(nano[1][0], 1, NEW, Sampling(decode=SCMOE), heard=lambda event: None)


def test_a_verifier_that_fails_ends_its_request_alone(nano, tokenizer):  # noqa: F811
    def broken(prompt, text):
        raise ValueError(text)

    waves = DecodingWaves(nano[0], tokenizer, verifier=broken)
    try:
        found = waves.run(nano[1][:2], [2, 2], new=NEW, samplings=[Sampling(1.0, seed=1, decode=DES), Sampling()])
        assert found[0][1][-1].error == "the step failed: ValueError" and found[0][1][-1].kind is ErrorKind.ENGINE
        assert found[1][0] == waves.tokens(nano[1][1:2], [2], new=NEW)[0]
    finally:
        waves.engine.stop()


BODY = {"model": "tiny", "prompt": "import os", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "quality": 1.0}


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_over_http(elastic_tiny, tmp_path, process):
    folder = with_levels(elastic_tiny, tmp_path / "tiny")
    check = tmp_path / "check.py"
    check.write_text("def good(prompt, text):\n    return text.count('e')\n")
    config = {"engine": {"process": process, "requests": 4, "step_tokens": 64, "cache_tokens": 2048, "page": 16}}
    with open_house(folder, config, decoding=["scmoe", "des", "rewiring"], verifier=f"{check}:good") as house:

        def ask(**more):
            return httpx2.post(f"{house.url}/completions", json=BODY | more, timeout=60)

        usual = ask().json()["choices"][0]
        assert "decoding" not in usual and ask(decode="scmoe:0").json()["choices"][0]["text"] == usual["text"]
        answer = ask(decode="scmoe:beta=0.9").json()
        assert answer["choices"][0]["decoding"] == {
            "method": "scmoe",
            "forwards": 24,
            "rows": answer["choices"][0]["decoding"]["rows"],
        }
        assert answer["usage"]["completion_tokens"] == 12 and answer["moe_prism"]["point"] == "full"
        assert answer["moe_prism"]["tokens"] == {"full": answer["usage"]["prompt_tokens"] + 11}
        assert ask(decode="scmoe:beta=0.9", quality="half").json()["moe_prism"]["point"] == "half"
        drawn = {ask(decode="des:beams=3:keep=1", temperature=1, seed=3).json()["choices"][0]["text"] for _ in range(2)}
        assert len(drawn) == 1
        streamed = ask(decode="scmoe:beta=0.9", stream=True).text
        assert '"decoding":{"method":"scmoe"' in streamed and streamed.rstrip().endswith("[DONE]")
        long = {"prompt": "import os\nimport sys\n\ndef main(argv):\n    return 0\n"}
        assert ask(**long, rewire=2).json()["choices"][0]["decoding"]["method"] == "plain"
        for more, param in (
            ({"decode": "concise:0.5"}, "decode"),
            ({"decode": "self-draft"}, "decode"),
            ({"decode": "rewiring"}, "decode"),
            ({"decode": "scmoe:beta=nan"}, "decode"),
            ({"decode": "scmoe:color=1"}, "decode"),
            ({"decode": "scmoe:rank=30"}, "decode"),
            ({"decode": "des:beams=17"}, "decode"),
            ({"decode": "x" * 513}, "decode"),
            ({"decode": "scmoe", "logprobs": 1}, "logprobs"),
            ({"decode": "scmoe", "self_draft": True}, "self_draft"),
            ({"rewire": 65}, "rewire"),
            ({"rewire": 1, "prompt": "x"}, "decode"),
        ):
            refused = ask(**more)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == param, (more, refused.text)
        assert house.idle() == []
    with open_house(folder) as house:
        for more in ({"decode": "scmoe"}, {"rewire": 1}):
            refused = httpx2.post(f"{house.url}/completions", json=BODY | more, timeout=60)
            assert refused.status_code == 400 and "--decoding" in refused.json()["error"]["message"]


def test_a_budget_that_is_held_over_a_request_is_refused_at_the_door():
    body = CompletionRequest(prompt="x", decode="scmoe:beta=0.9")
    service = SimpleNamespace(decoding=("scmoe",), ladder=LADDER, config=Config(), verifies=False)
    check_decoding(service, body, SimpleNamespace(ceiling=LADDER.top, adapter=""))
    with pytest.raises(Refusal, match="held over a request"):
        check_decoding(service, body, SimpleNamespace(ceiling=1, adapter=""))


def test_an_operators_mistakes_are_refused_before_the_model_is_loaded(elastic_tiny):
    from moe_prism.errors import UsageError
    from moe_prism.options.serve import ServeOptions

    for options, said in (
        ({"decoding": ["expert-rag"]}, "cannot ask for 'expert-rag'"),
        ({"decoding": ["des"]}, "--verifier"),
        ({"verifier": "x.py:f"}, "--decoding des"),
    ):
        with pytest.raises(UsageError, match=said):
            ServeOptions(**options).check()
    with pytest.raises(UsageError, match="no file"), open_house(elastic_tiny, decoding=["des"], verifier="missing.py:f"):
        pass

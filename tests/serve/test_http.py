"""The server as its clients see it: the openai package, raw server-sent events, lm-eval's request."""

from __future__ import annotations

import asyncio
import json
import math
import time

import httpx2
import openai
import pytest
import torch

from moe_prism.serve.http.strands import Strand
from tests.faults.points import fault
from tests.serve.house import LEVELS, open_house

PROMPT = "def main(args):\n    return "


@pytest.fixture(scope="module")
def client(house):
    with openai.OpenAI(base_url=house.url, api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def web(house):
    with httpx2.Client(base_url=house.root, timeout=30) as made:
        yield made


def post(web, **body):
    return web.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "temperature": 0, **body})


def test_models_name_the_operating_points(client):
    model, *qualities = client.models.list().data
    assert model.id == "tiny" and [p["name"] for p in model.operating_points] == ["low", "half", "full"]
    assert {card.id for card in qualities} == {"tiny@low", "tiny@half", "tiny@full"}


def test_completion(client, house):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0)
    tokens = house.built.service.tokenizer(PROMPT)["input_ids"]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokens), 6)
    assert answer.moe_prism["point"] in ("low", "half", "full", "mixed") and answer.system_fingerprint.startswith("prism-")


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(client, n):
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0.8, "seed": 5, "n": n}
    whole = client.completions.create(**ask)
    texts, finishes, usage = [""] * n, {}, None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    assert texts == [c.text for c in whole.choices] and len(finishes) == n and all(finishes.values())
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert n == 1 or len(set(texts)) > 1


def test_server_sent_events_are_well_formed(web):
    with web.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    events = text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]" and all(e.startswith("data: ") for e in events[:-1])
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] and last["moe_prism"]["tokens"]


@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({"quality": 1.0}, "full"),
        ({"quality": 0.85}, "half"),
        ({"quality": "low"}, "low"),
        ({"min_quality": 0.9}, "half..full"),
        ({"quality": "half", "min_quality": "low"}, "low..half"),
        ({"class": "batch"}, "half..full"),
    ],
)
def test_a_request_chooses_its_levels(web, fields, levels):
    answer = post(web, **fields)
    assert answer.status_code == 200 and answer.headers["x-moe-prism-levels"] == levels
    assert set(answer.json()["moe_prism"]["tokens"]) <= {"low", "half", "full"}
    if ".." not in levels:
        assert answer.headers["x-moe-prism-point"] == levels
        quality = {**{v["name"]: v["quality"] for v in LEVELS}, "full": 1.0}[levels]
        assert float(answer.headers["x-moe-prism-quality"]) == quality


def test_extra_body_reaches_us_through_the_openai_client(client):
    extra = {"quality": 0.85, "ttft_ms": 900, "tpot_ms": 90, "priority": -1, "class": "batch"}
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, extra_body=extra)
    assert answer.moe_prism["point"] == "half"


def test_stop_strings_cut_the_text(web):
    full = post(web, max_tokens=24).json()["choices"][0]["text"]
    stop = full[5:8]
    cut = post(web, max_tokens=24, stop=["never there", stop]).json()
    assert cut["choices"][0]["text"] == full[: full.index(stop)] and cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 24
    with web.stream("POST", "/v1/completions", json={
        "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stream": True, "stop": stop
    }) as answer:  # fmt: skip
        parts = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(c["text"] for p in parts for c in p["choices"]) == full[: full.index(stop)]


def test_lm_eval_scores_a_continuation(web, house):
    """`local-completions` sends token ids with echo and reads the prompt's log-probabilities back."""
    service = house.built.service
    tokens = service.tokenizer(PROMPT)["input_ids"]
    body = {
        "model": "tiny",
        "prompt": [tokens, tokens[:5]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = web.post("/v1/completions", json={**body, "quality": 1.0}).json()
    first = answer["choices"][0]["logprobs"]
    with torch.no_grad():
        log_p = dense_logits(house, tokens).log_softmax(-1)
    expected = [float(log_p[i, t]) for i, t in enumerate(tokens[1:])]
    assert first["token_logprobs"][0] is None and len(first["tokens"]) == len(tokens) + 1
    assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(first["token_logprobs"][1:-1], expected, strict=True))
    greedy = [
        token == max(top, key=top.get) for token, top in list(zip(first["tokens"], first["top_logprobs"], strict=True))[1:-1]
    ]
    assert greedy == [int(row.argmax()) == t for row, t in zip(log_p, tokens[1:], strict=False)]
    assert answer["choices"][0]["text"].startswith(PROMPT) and len(answer["choices"][1]["logprobs"]["tokens"]) == 6


def dense_logits(house, tokens):
    """The same model loaded afresh: the served one belongs to the engine."""
    import moe_prism

    model, _ = moe_prism.load(house.folder)
    return model(torch.tensor([tokens])).logits[0].float()


def test_echo_without_new_tokens(web):
    answer = post(web, max_tokens=0, echo=True, logprobs=1).json()
    assert answer["choices"][0]["text"] == PROMPT and answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["logprobs"]["text_offset"][0] == 0


def test_chat_needs_a_template(client):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


def test_chat(chat_house):
    tokenizer = chat_house.built.service.tokenizer
    with openai.OpenAI(base_url=chat_house.url, api_key="unused", max_retries=0) as client:
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
        answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        assert answer.usage.prompt_tokens == len(tokenizer("user: hello\nassistant: ")["input_ids"])
        assert len(answer.choices[0].logprobs.content) == 5 and len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
        chunks = list(client.chat.completions.create(**ask, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
        usages = [c.usage.completion_tokens for c in client.chat.completions.create(
            **ask, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})]  # fmt: skip
        assert usages[0] == 0 and usages[-1] == 5 and usages == sorted(usages)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"class": "royal"}, 400, "class"),
        ({"quality": "superb"}, 400, "quality"),
        ({"quality": 0.8, "min_quality": 0.95}, 400, "min_quality"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"max_tokens": 1000}, 400, "max_tokens"),
        ({"prompt": [99_999]}, 400, "prompt"),
        ({"n": 16, "prompt": [PROMPT] * 2}, 400, "n"),
        ({"n": 9, "prompt": [PROMPT] * 2}, 400, "n"),  # of 20 places the default class may have 16
    ],
)
def test_errors_have_openai_form(web, fields, status, param):
    answer = post(web, **fields)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param and error["message"] and error["type"]


def test_other_routes_and_methods(web):
    assert web.get("/v1/nothing").status_code == 404 and web.get("/v1/completions").status_code == 405
    assert "message" in web.get("/v1/nothing").json()["error"]
    assert web.get("/health").json() == {"status": "ok"} and web.get("/ready").json()["status"] == "ready"


def test_metrics_count_what_was_done(web, house):
    def value(name):
        lines = [line for line in web.get("/metrics").text.splitlines() if line.startswith("moe_prism:" + name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    before = {
        n: value(n)
        for n in ("generation_tokens_total", "prompt_tokens_total", "operating_point_tokens_total", "request_success_total")
    }
    answer = post(web, prompt="never seen before in here", max_tokens=3, quality="low").json()
    house.idle()
    prompt = answer["usage"]["prompt_tokens"]
    assert value("generation_tokens_total") - before["generation_tokens_total"] == 3
    assert value("prompt_tokens_total") - before["prompt_tokens_total"] == prompt
    assert value("operating_point_tokens_total") - before["operating_point_tokens_total"] == prompt + 2
    assert value("request_success_total") - before["request_success_total"] == 1
    assert value("num_requests_running") == 0 == value("num_requests_waiting")


def test_an_empty_prompt_begins_from_nothing(web):
    assert post(web, prompt="").json()["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    "policy", ["elastic", "prism", *(pytest.param(each, marks=pytest.mark.slow) for each in ("edf", "fifo", "full-batch"))]
)
def test_every_policy_serves(tiny_levels, policy):
    with open_house(tiny_levels, policy=policy) as house, openai.OpenAI(base_url=house.url, api_key="x") as client:
        answer = client.completions.create(model="tiny", prompt=[PROMPT] * 6, max_tokens=5, extra_body={"min_quality": 0.85})
        assert len(answer.choices) == 6 and set(answer.moe_prism["tokens"]) <= {"half", "full"}
        assert house.idle() == []


@pytest.fixture
def waiting(house):
    """Tasks of the server's event loop that have not ended."""

    async def names():
        return [task.get_coro().__qualname__ for task in asyncio.all_tasks()]

    def count(name):
        loop = house.built.service._mail._loop
        return asyncio.run_coroutine_threadsafe(names(), loop).result(10).count(name)

    return count


def test_where_one_of_n_sequences_fails_nobody_waits_for_the_others(web, waiting):
    def fails(runner, parts, spans, logits):
        for row, part in enumerate(parts):
            if part.request.job.id.endswith("-1") and part.yields:
                logits[row] = math.nan

    with fault("logits", fails):
        answer = post(web, n=3, max_tokens=100)
    assert answer.status_code == 503 and "not finite" in answer.json()["error"]["message"]
    until = time.monotonic() + 10
    while waiting("_collect") and time.monotonic() < until:
        time.sleep(0.01)
    assert waiting("_collect") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_ours_ends_an_answer(web, monkeypatch, stream):
    def fails(self, event):
        raise RuntimeError("Already borrowed")

    monkeypatch.setattr(Strand, "piece", fails)
    answer = post(web, stream=stream)
    assert answer.status_code == (200 if stream else 500)
    assert stream or answer.headers["connection"] == "close"  # or the next request would meet the end of this connection
    assert json.loads(answer.text.removeprefix("data: "))["error"]["message"] == "an error inside the server"

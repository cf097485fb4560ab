"""One rule for request fields: every field of OpenAI's endpoints, of vLLM's and of ours is done, refused by name, or listed as without
effect; null is left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

import httpx2
import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from moe_prism.serve.http.fields import OPENAI, OURS, REFUSED, VLLM, WITHOUT_EFFECT, Endpoint
from moe_prism.serve.http.protocol import REQUESTS, CompletionRequest
from moe_prism.serve.http.values import MAX_MS, TpotMs, TtftMs
from moe_prism.serve.reference import PAGE, _check, page, rows
from moe_prism.serve.route.request import RouteRequest
from moe_prism.serve.text.desk import Desk
from moe_prism.serve.text.jobs import Compile, Unfit
from tests.tiers import by_night

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
BASE = {
    "completions": {"prompt": "def main(", "max_tokens": 3, "temperature": 0},
    "chat": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0},
}
NEEDED = {"completions": "prompt", "chat": "messages"}
WRONG = {"not": {"a": "value"}}
WITH = {  # what a valid value cannot do without
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "max_completion_tokens": {"max_tokens": None},
    "continue_final_message": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I"}]},
    "min_quality": {"quality": 1.0},
}
EVERY = [(e, row.name) for e in get_args(Endpoint) for row in rows(e)]


@pytest.fixture(scope="module")
def web(chat_house):
    with httpx2.Client(base_url=chat_house.root, timeout=60) as made:
        yield made


def ask(web, endpoint, **fields):
    return web.post(PATHS[endpoint], json={**BASE[endpoint], **fields})


def refused(answer, name):
    error = answer.json()["error"]
    return answer.status_code == 400 and error["param"].split(".")[0] == name and name in error["message"] and error["code"]


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (1 << 20, "2^20"),
        (-(1 << 63), "-2^63"),
        ((1 << 63) - 1, "2^63 - 1"),
        (3_600_000, "3,600,000"),
        (3.6e6, "3,600,000"),
        (0.1, "0.1"),
    ],
)
def test_a_bound_is_written_exactly(bound, said):
    schema = {"type": "number", "minimum": 1, "maximum": bound}
    assert _check(schema, {}) == f"number, 1 to {said}"


def test_targets_of_requests_and_of_a_router_have_one_bound():
    fields = [each.model_fields[name].annotation for each in (CompletionRequest, RouteRequest) for name in ("ttft_ms", "tpot_ms")]
    assert fields == [TtftMs | None, TpotMs | None] * 2
    for row in rows("completions"):
        if row.name in ("ttft_ms", "tpot_ms"):
            assert row.check.endswith(f" to {MAX_MS:,}")


def test_the_table_has_every_field_of_openai():
    chat = set(chat_create_params.CompletionCreateParamsStreaming.__annotations__)
    assert OPENAI["completions"] == set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert OPENAI["chat"] == chat | set(chat_create_params.CompletionCreateParamsBase.__annotations__)


@pytest.mark.parametrize("endpoint", get_args(Endpoint))
def test_every_field_has_one_place(endpoint):
    done = set(REQUESTS[endpoint].names())
    everything = OPENAI[endpoint] | VLLM[endpoint] | OURS
    assert everything <= done | set(REFUSED) | set(WITHOUT_EFFECT)
    assert not done & set(REFUSED) and not done & set(WITHOUT_EFFECT) and not set(REFUSED) & set(WITHOUT_EFFECT)


def test_the_page_is_what_the_table_says():
    file = Path(__file__).parents[2] / "docs" / "reference" / PAGE
    assert file.read_text("utf-8") == page(), "run `make reference` and commit what it writes"


@pytest.mark.parametrize("endpoint", get_args(Endpoint))
def test_nulls_are_left_out_together(web, endpoint):
    nulls = {name: None for e, name in EVERY if e == endpoint and name != NEEDED[endpoint]}
    answer = ask(web, endpoint, **nulls)
    assert len(nulls) > 60 and answer.status_code == 200 and "x-moe-prism-ignored" not in answer.headers, answer.text


@pytest.mark.parametrize(("endpoint", "name"), by_night(EVERY, *NEEDED.items()))
def test_null_is_left_out(web, endpoint, name):
    answer = ask(web, endpoint, **{name: None})
    if name == NEEDED[endpoint]:
        assert refused(answer, name)
    else:
        assert answer.status_code == 200 and "x-moe-prism-ignored" not in answer.headers, answer.text


@pytest.mark.parametrize(("endpoint", "name"), EVERY)
def test_a_valid_value_is_done_or_refused_or_listed(web, endpoint, name):
    made = REQUESTS[endpoint]
    field = next((f for n, f in made.model_fields.items() if (f.alias or n) == name), None)
    does = next(row.does for row in rows(endpoint) if row.name == name)
    if does == "done":
        value = "tiny" if name == "model" else field.examples[0]
        answer = ask(web, endpoint, **{**WITH.get(name, {}), name: value})
        assert answer.status_code == 200 and "x-moe-prism-ignored" not in answer.headers, answer.text
    elif does == "refused":
        answer = ask(web, endpoint, **{name: REFUSED[name].example})
        assert refused(answer, name) == "unsupported", answer.text
        for neutral in REFUSED[name].neutral:
            assert ask(web, endpoint, **{name: neutral}).status_code == 200
    else:
        answer = ask(web, endpoint, **{name: WITHOUT_EFFECT[name].example})
        assert answer.status_code == 200 and answer.headers["x-moe-prism-ignored"] == name


@pytest.mark.parametrize(("endpoint", "name"), EVERY)
def test_an_invalid_value_is_refused_by_name(web, endpoint, name):
    value = 3.5 if ask_takes_objects(endpoint, name) else WRONG
    answer = ask(web, endpoint, **{name: value})
    assert refused(answer, name), answer.text
    assert "3.5" not in answer.text and '"a"' not in answer.text  # never the value: it may be the prompt


def ask_takes_objects(endpoint, name):
    field = REFUSED.get(name) or WITHOUT_EFFECT.get(name)
    kind = next(
        (f.annotation for n, f in REQUESTS[endpoint].model_fields.items() if (f.alias or n) == name), field and field.check
    )
    return "dict" in str(kind) or ("Any" in str(kind) and field is not None)


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "says"),
    [
        ("completions", {"qualty": 0.5}, "qualty", "did you mean 'quality'"),
        ("completions", {"messages": []}, "messages", "belongs to /v1/chat/completions"),
        ("completions", {"guided_json": {}}, "guided_json", "use structured_outputs"),
        ("completions", {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ("completions", {"prompt": [True]}, "prompt", "a list of token ids"),
        ("completions", {"prompt": []}, "prompt", "none of them empty"),
        ("completions", {"prompt": [1, "x"]}, "prompt.1", "valid integer"),
        ("completions", {"prompt": ["x"] * 65}, "prompt", "at most 64"),
        ("completions", {"quality": 1.5}, "quality", "less than or equal to 1"),
        ("completions", {"stop": [3]}, "stop.0", "valid string"),
        ("completions", {"logprobs": True}, "logprobs", "valid integer"),
        ("completions", {"best_of": 3}, "best_of", "only be n"),
        ("completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ("completions", {"min_tokens": 4}, "min_tokens", "above max_tokens"),
        ("completions", {"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ("completions", {"logit_bias": {"five": 1}}, "logit_bias", "outside the vocabulary"),
        ("completions", {"stop_token_ids": [10**6]}, "stop_token_ids", "outside the vocabulary"),
        ("completions", {"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ("completions", {"top_k": -2}, "top_k", "greater than or equal to -1"),
        ("completions", {"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ("completions", {"temperature": "hot"}, "temperature", "valid number"),
        ("completions", {"stop": ["a<|endoftext|>"]}, "stop", "special token"),
        ("completions", {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ("completions", {"structured_outputs": {"regex": "(("}}, "structured_outputs", "cannot be used"),
        ("completions", {"structured_outputs": {"choice": ["a"]}, "min_tokens": 2}, "min_tokens", "together"),
        ("completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "left out"),
        ("completions", {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "messages.0", "content is left out"),
        ("chat", {"chat_template_kwargs": {"enable_thinking": 10**20}}, "chat_template_kwargs", "cannot be passed on"),
        ("chat", {"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content.0", "valid dictionary"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
            "nothing but text",
        ),
        ("chat", {"messages": [{"role": "user", "content": "a", "mood": "x"}]}, "messages.0.mood", "does not know 'mood'"),
        (
            "chat",
            {"chat_template_kwargs": {"bos_token": "x"}},
            "chat_template_kwargs.bos_token",
            "enable_thinking, reasoning_effort",
        ),
        ("chat", {"tools": [], "tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
        ("chat", {"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt", "either"),
        ("chat", {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ("chat", {"echo": True}, "echo", "False"),
    ],
)
def test_messages_name_what_was_meant(web, endpoint, fields, param, says):
    answer = ask(web, endpoint, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"], error
    assert error["code"] and error["type"] == "invalid_request_error"


def test_nested_nulls_are_left_out(web):
    answer = ask(web, "completions", stream=True, stream_options={"include_usage": None}, logit_bias={"5": None})
    assert answer.status_code == 200 and '"usage"' not in answer.text
    nulls = {"tool_calls": None, "name": None, "refusal": None}
    answer = ask(web, "chat", messages=[{"role": "user", "content": "hi", "type": "text", **nulls}])
    assert answer.status_code == 200 and answer.headers["x-moe-prism-ignored"] == "messages.type"


def test_what_java_clients_send(web):
    empty = dict.fromkeys([*OPENAI["completions"] - {"prompt", "max_tokens", "model"}])
    assert ask(web, "completions", **empty).status_code == 200


def test_the_vocabulary_of_a_misspelt_field_is_not_echoed(web):
    answer = ask(web, "completions", **{"a b\r\nx": 1})
    assert answer.status_code == 400 and "a b" not in answer.text


def text(answer):
    return answer.json()["choices"][0].get("text", "")


HOT = {"temperature": 1.0, "seed": 11, "max_tokens": 12}


def test_fields_of_sampling_do_what_they_say(web):
    greedy = text(ask(web, "completions", max_tokens=12))
    assert text(ask(web, "completions", **HOT)) != greedy
    for alone in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert text(ask(web, "completions", **HOT, **alone)) == greedy
    ids = ask(web, "completions", max_tokens=12, return_token_ids=True).json()["choices"][0]["token_ids"]
    banned = ask(web, "completions", logit_bias={str(ids[0]): -100}, return_token_ids=True).json()["choices"][0]["token_ids"]
    assert banned[0] != ids[0]
    only = ask(web, "completions", **HOT, allowed_token_ids=[40, 41], return_token_ids=True).json()["choices"][0]["token_ids"]
    assert set(only) <= {40, 41} and len(only) == 12
    few = ask(web, "completions", allowed_token_ids=[40, 41], frequency_penalty=2.0, max_tokens=12, return_token_ids=True)
    assert {40, 41} <= set(few.json()["choices"][0]["token_ids"])
    strong = ask(web, "completions", max_tokens=12, repetition_penalty=10.0, return_token_ids=True).json()["choices"][0][
        "token_ids"
    ]
    assert len(set(strong)) >= len(set(ids))


def test_stop_tokens_end_an_answer_after_min_tokens(web):
    ids = ask(web, "completions", max_tokens=12, return_token_ids=True).json()["choices"][0]["token_ids"]
    at = next(i for i, t in enumerate(ids) if i >= 2 and t not in ids[:i])
    ended = ask(web, "completions", max_tokens=12, stop_token_ids=[ids[at]], return_token_ids=True).json()["choices"][0]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", ids[at]) and ended["token_ids"] == ids[: at + 1]
    shown = ask(web, "completions", max_tokens=12, stop_token_ids=[ids[at]], include_stop_str_in_output=True)
    assert text(shown).startswith(ended["text"]) and len(text(shown)) >= len(ended["text"])
    longer = ask(web, "completions", max_tokens=12, stop_token_ids=[ids[at]], min_tokens=at + 3, return_token_ids=True)
    assert len(longer.json()["choices"][0]["token_ids"]) >= at + 3


def test_a_special_token_stops_by_its_id(web):
    only = {"allowed_token_ids": [0], "ignore_eos": True, "max_tokens": 5}  # <|endoftext|>
    assert ask(web, "completions", **only).json()["usage"]["completion_tokens"] == 5
    ended = ask(web, "completions", **only, stop="<|endoftext|>").json()
    assert ended["usage"]["completion_tokens"] == 1 and ended["choices"][0]["stop_reason"] == 0
    seen = ask(web, "completions", **only, skip_special_tokens=False).json()["choices"][0]["text"]
    assert seen == "<|endoftext|>" * 5


def test_prompt_logprobs_are_those_of_an_echo(web):
    asked = ask(web, "completions", prompt_logprobs=2, logprobs=2, echo=True).json()["choices"][0]
    echoed, rows_ = asked["logprobs"]["token_logprobs"], asked["prompt_logprobs"]
    assert rows_[0] is None and echoed[0] is None and len(rows_) > 2
    for row, own in zip(rows_[1:], echoed[1:], strict=False):
        assert own in [known["logprob"] for known in row.values()] and 2 <= len(row) <= 3


def test_a_prompt_is_cut_from_the_left(web):
    long = "x y " * 400
    assert ask(web, "completions", prompt=long).status_code == 400
    cut = ask(web, "completions", prompt=long, truncate_prompt_tokens=7).json()
    assert cut["usage"]["prompt_tokens"] == 7
    fits = ask(web, "completions", prompt=long, truncate_prompt_tokens=-1).json()
    assert fits["usage"]["total_tokens"] == 128


def test_messages_reach_the_template_as_they_are(web, chat_house):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]},
    ]
    tokens = lambda said: len(chat_house.built.service.tokenizer(said)["input_ids"])  # noqa: E731
    expected = "user: hi\nassistant:  call f 7\ntool 1: 42\n"
    answer = ask(web, "chat", messages=messages, tools=tools, chat_template_kwargs={"enable_thinking": True})
    assert answer.json()["usage"]["prompt_tokens"] == tokens(f"tool look\nthink\n{expected}assistant: ")
    answer = ask(web, "chat", messages=messages, tools=tools, tool_choice="none", reasoning_effort="low")
    assert answer.json()["usage"]["prompt_tokens"] == tokens(f"effort low\n{expected}assistant: ")
    answer = ask(web, "chat", messages=messages, add_generation_prompt=False)
    assert answer.json()["usage"]["prompt_tokens"] == tokens(expected)
    last = [*messages, {"role": "assistant", "content": "The"}]
    answer = ask(web, "chat", messages=last, continue_final_message=True)
    assert answer.json()["usage"]["prompt_tokens"] == tokens(f"{expected}assistant: The")


FORMS = {
    "choice": ({"choice": ["maybe", "ü?"]}, r"maybe|ü\?"),
    "regex": ({"regex": r"[0-9]{3}-(x|yz)"}, r"[0-9]{3}-(x|yz)"),
    "grammar": ({"grammar": 'root ::= "a" root "b" | "ab"'}, r"a+b+"),
    "json": (
        {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
        r'\{\s*"a"\s*:\s*(true|false)\s*\}',
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_form_that_was_asked_for(web, form, stream):
    pytest.importorskip("xgrammar")
    asked, expected = FORMS[form]
    body = {"structured_outputs": asked, "temperature": 1.5, "seed": 3, "max_tokens": 100, "prompt": "x", "stream": stream}
    answer = ask(web, "completions", **body)
    if stream:
        said = "".join(re.findall(r'"text":"((?:[^"\\]|\\.)*)"', answer.text)).encode().decode("unicode_escape")
        assert re.fullmatch(expected, said.encode("latin-1", "ignore").decode("utf-8", "ignore") if "ü" not in said else said)
    else:
        choice = answer.json()["choices"][0]
        assert re.fullmatch(expected, choice["text"]) and choice["finish_reason"] == "stop", choice


def test_response_format_is_openais_way(chat_house):
    pytest.importorskip("xgrammar")
    schema = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": FORMS["json"][0]["json"]}}
    with openai.OpenAI(base_url=chat_house.url, api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=100, response_format=schema, seed=2
        )
    assert re.fullmatch(FORMS["json"][1], answer.choices[0].message.content)


def test_without_xgrammar_a_form_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    told = Desk(None, 1, 100).do(Compile("choice", '["a"]', 10, [0]))
    assert isinstance(told, Unfit) and "moe-prism[structured]" in told.message


def test_examples_of_the_table_are_valid_by_themselves():
    for name, field in CompletionRequest.model_fields.items():
        assert field.examples, name

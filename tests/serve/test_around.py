"""HTTP around the API: what clients ask beside completions, and in the ways that they ask."""

from __future__ import annotations

import json

import httpx2
import openai
import pytest

from moe_prism.errors import UsageError
from moe_prism.options.serve import ServeOptions
from moe_prism.serve.keys import keys
from tests.serve.house import open_house

BODY = {"prompt": "def main(", "max_tokens": 2, "temperature": 0}
PAGE = {"origin": "https://page.example"}


@pytest.fixture(scope="module")
def web(chat_house):
    with httpx2.Client(base_url=chat_house.root, timeout=60) as made:
        yield made


def test_a_model_is_retrieved_by_its_name(chat_house, web):
    with openai.OpenAI(base_url=chat_house.url, api_key="x", max_retries=0) as client:
        assert client.models.retrieve("tiny").id == "tiny" and client.models.retrieve("tiny@0.9").id == "tiny@0.9"
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
            client.models.retrieve("gpt-4")
    assert web.get("/v1/models/tiny@nonsense").status_code == 400


def test_version(web):
    assert web.get("/version").json()["version"]


def test_text_goes_to_tokens_and_back(chat_house, web):
    words = chat_house.built.service.tokenizer
    text = "def 漢🙂():"
    said = web.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert said["tokens"] == words(text)["input_ids"] and said["count"] == len(said["tokens"]) == len(said["token_strs"])
    assert said["max_model_len"] == 128
    assert web.post("/detokenize", json={"tokens": said["tokens"]}).json() == {"prompt": text}
    chat = web.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}).json()
    assert chat["tokens"] == words("user: hi\n")["input_ids"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools.0.type"),
        ("/tokenize", {"prompt": "a", "moods": 1}, "moods"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_bad_ones_are_refused_by_name(web, path, body, param):
    answer = web.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_head_and_slashes(web):
    for path in ("/health", "/v1/models", "/health/", "/v1/models/"):
        whole, head = web.get(path), web.head(path)
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    assert web.post("/v1/completions/", json=BODY).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "text/plain; charset=utf-8", "application/x-www-form-urlencoded", ""])
def test_json_under_another_name(web, kind):
    answer = web.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
    assert answer.status_code == 200
    refused = web.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind, **PAGE})
    assert refused.status_code == 415  # a page sends that to anywhere without asking


def preflight(web):
    return web.options("/v1/completions", headers={**PAGE, "access-control-request-method": "POST"})


def test_pages_may_ask_where_the_operator_says_so(web, tiny_levels):
    assert preflight(web).status_code == 405 and "access-control-allow-origin" not in web.get("/health", headers=PAGE).headers
    options = {"allowed_origins": ("https://page.example",), "api_key": "one two"}
    engine = {"requests": 4, "step_tokens": 64, "cache_tokens": 2048, "page": 16, "process": False, "prefix_cache_per_key": True}
    with open_house(tiny_levels, {"engine": engine}, **options) as house, httpx2.Client(base_url=house.root, timeout=60) as other:
        asked = preflight(other)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == PAGE["origin"]
        assert other.post("/v1/completions", json=BODY, headers=PAGE).status_code == 401
        answer = other.post("/v1/completions", json=BODY, headers={**PAGE, "authorization": "Bearer two"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE["origin"]
        strange = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in other.options("/v1/completions", headers=strange).headers

        def cached(key, **fields):
            body = {**BODY, "prompt": "for i in range(10):\n" * 6, "quality": 1.0, **fields}
            said = other.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
            return said.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("one") == 0 < cached("one") and cached("two") == 0 < cached("two")
        assert cached("one", cache_salt="mine") == 0 < cached("one", cache_salt="mine")


def test_keys_come_from_a_file_or_the_environment(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \none\n")
    file.chmod(0o600)
    assert keys(ServeOptions(api_key_file=file), {}) == ("one", "two") and not caplog.records
    assert keys(ServeOptions(), {"MOE_PRISM_API_KEY": "k"}) == ("k",) and keys(ServeOptions(), {}) == ()
    assert keys(ServeOptions(api_key="k"), {}) == ("k",) and "can be seen by everybody" in caplog.text
    file.chmod(0o644)
    assert keys(ServeOptions(api_key_file=file), {}) and "chmod 600" in caplog.text
    file.write_text("\n")
    for options, cause in (
        (ServeOptions(api_key_file=file), "has no key"),
        (ServeOptions(api_key_file=tmp_path / "none"), "cannot read the keys"),
        (ServeOptions(api_key="k", api_key_file=file), "are both given"),
    ):
        with pytest.raises(UsageError, match=cause):
            keys(options, {})


def test_models_are_listed_at_every_quality(web):
    names = [card["id"] for card in web.get("/v1/models").json()["data"]]
    assert names[0] == "tiny" and all(web.get(f"/v1/models/{name}").status_code == 200 for name in names)
    assert names[1:] == [f"tiny@{point['name']}" for point in web.get("/v1/models").json()["data"][0]["operating_points"]]


def test_metrics_have_vllms_names_too(web):
    lines = [line for line in web.get("/metrics").text.splitlines() if line.startswith("vllm:")]
    ours = [line for line in web.get("/metrics").text.splitlines() if line.startswith("moe_prism:num_requests_running{")]
    assert 'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0' in lines and ours
    assert any(line.startswith("vllm:time_to_first_token_seconds_bucket{") for line in lines)
    assert {"vllm:kv_cache_usage_perc", "vllm:generation_tokens_total"} <= {line.split("{")[0] for line in lines}


def test_a_request_keeps_the_name_that_its_client_gave_it(web, caplog):
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    with caplog.at_level("INFO", logger="moe_prism.requests"):
        named = {"x-request-id": "mine-1", "traceparent": trace}
        done = web.post("/v1/completions", json={"prompt": "import", "max_tokens": 1}, headers=named)
    assert done.headers["x-request-id"] == "mine-1"
    assert any(r.fields.get("request_id") == "mine-1" and r.fields["traceparent"] == trace for r in caplog.records)
    refused = web.post("/v1/completions", json={"prompt": 1.5}, headers={"x-request-id": "mine-2"})
    assert refused.status_code == 400 and refused.headers["x-request-id"] == "mine-2"
    assert "x-request-id" not in web.get("/health", headers={"x-request-id": "two words"}).headers

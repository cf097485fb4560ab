"""The requests of EleutherAI's lm-eval (`local-completions`, 0.4.13), and how it reads the answers."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch

from tests.serve.lm_eval_tasks import TASKS, write_tasks

PROMPT = "def main(args):\n    return "


@pytest.fixture(scope="module")
def web(house):
    with httpx2.Client(base_url=house.root, timeout=30) as made:
        yield made


def score(web, rows, model="tiny@1"):
    """Its request for log-likelihoods; nothing can be added to it but the model's name."""
    body = {"model": model, "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = web.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return sorted(answer.json()["choices"], key=lambda choice: choice["index"])


def read_score(choice, context):
    """(sum of log-probabilities, greedy) of the tokens behind the context: the last one listed is the generated one."""
    own, top = (choice["logprobs"][name][context:-1] for name in ("token_logprobs", "top_logprobs"))
    return sum(own), all(p == max(t.values()) for p, t in zip(own, top, strict=True))


@torch.no_grad()
def reference(model, tokens, context):
    rows = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[context - 1 : -1]
    own = rows.gather(1, torch.tensor(tokens[context:])[:, None])[:, 0]
    return float(own.sum()), bool((own == rows.max(-1).values).all())


@pytest.fixture(scope="module")
def dense(house):
    """The same model loaded afresh: the served one belongs to the engine."""
    import moe_prism

    return moe_prism.load(house.folder)[0]


def test_scores_of_a_batch_are_the_models(web, house, dense):
    encode = house.built.service.tokenizer
    cases = [(encode(PROMPT)["input_ids"], encode(end)["input_ids"]) for end in ("args.name", "0", "\n\n\nclass A:")]
    choices = score(web, [context + end for context, end in cases])
    for choice, (context, end) in zip(choices, cases, strict=True):
        found, greedy = read_score(choice, len(context))
        expected, best = reference(dense, context + end, len(context))
        assert found == pytest.approx(expected, abs=1e-3) and greedy is best


def test_a_greedy_continuation_is_seen_as_one(web, house):
    tokens = house.built.service.tokenizer(PROMPT)["input_ids"]
    for _ in range(3):  # three times the token that the server itself holds most likely
        (choice,) = score(web, [tokens])
        tokens = [*tokens, encode_one(house, choice["logprobs"]["tokens"][-1])]
    assert read_score(score(web, [tokens])[0], len(tokens) - 3)[1] is True
    assert read_score(score(web, [[*tokens[:-1], tokens[-1] + 1]])[0], len(tokens) - 3)[1] is False


def encode_one(house, text):
    tokenizer = house.built.service.tokenizer
    (found,) = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == text]
    return found


@pytest.mark.parametrize("context", [1, 4])
def test_the_end_token_does_not_take_a_scored_one_away(web, house, dense, monkeypatch, context):
    """It cuts off the generated token, whatever that is, so an end token must be listed as well."""
    service = house.built.service
    tokens = service.tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        following = int(dense(torch.tensor([tokens])).logits[0, -1].argmax())
    monkeypatch.setattr(service, "eos", frozenset({following}))
    (choice,) = score(web, [tokens])
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == len(tokens) + 1
    assert read_score(choice, context)[0] == pytest.approx(reference(dense, tokens, context)[0], abs=1e-3)


def test_a_rolling_window_of_the_whole_context(web, house, dense):
    """Windows are `max_length` - 1 tokens behind an end token, by default one less than the context."""
    service = house.built.service
    text = service.tokenizer(PROMPT * 200)["input_ids"]
    window = [*sorted(service.eos)[:1], *text][: service.context - 1]
    (choice,) = score(web, [window])
    found, _ = read_score(choice, 1)
    assert len(choice["logprobs"]["tokens"]) == service.context
    assert found == pytest.approx(reference(dense, window, 1)[0], rel=1e-4)


def test_a_key_of_no_letters(house):
    """What it sends where OPENAI_API_KEY is not set."""
    connection = http.client.HTTPConnection("127.0.0.1", house.port, timeout=30)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json", "authorization": "Bearer "})
    assert connection.getresponse().status == 200
    connection.close()


def assert_same(first, *others):
    """The same tokens, and numbers that differ by rounding: the BLAS behind attention and head may add up a row by the batch it is in."""
    for other in others:
        a, b = first["logprobs"], other["logprobs"]
        assert a["tokens"] == b["tokens"]
        assert a["token_logprobs"][1:] == pytest.approx(b["token_logprobs"][1:], abs=1e-5)
        assert [row and row.keys() for row in a["top_logprobs"]] == [row and row.keys() for row in b["top_logprobs"]]


def test_prompts_as_text(web, house):
    """`tokenized_requests=False`: one text, or a list of them with a larger batch."""
    tokens = house.built.service.tokenizer(PROMPT)["input_ids"]
    one, two, ids = score(web, PROMPT), score(web, [PROMPT, PROMPT]), score(web, [tokens])
    assert_same(one[0], *two, *ids)


def test_a_batch_larger_than_what_runs_at_once(web, house):
    tokens = house.built.service.tokenizer(PROMPT)["input_ids"]
    engine = house.built.service.config.engine
    choices = score(web, [tokens] * (engine.requests * 3))
    assert len(choices) == engine.requests * 3
    assert_same(*choices)


@pytest.mark.parametrize("model", ["tiny", "tiny@half"])
def test_generation(web, house, model):
    """`generate_until`: stop strings with the end token's text among them; further generation arguments are fields of the body."""
    tokens = house.built.service.tokenizer(PROMPT)["input_ids"]
    body = {
        "prompt": [tokens, tokens],
        "model": model,
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n", "<|endoftext|>"],
        "seed": 1234,
    }
    answer = web.post("/v1/completions", json={**body, **({"quality": "half"} if model == "tiny" else {})})
    assert answer.headers["x-moe-prism-point"] == "half"
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts[0] == texts[1] and "\n" not in texts[0]


@pytest.mark.parametrize(
    ("model", "levels"),
    [("tiny@1", "full"), ("tiny@full", "full"), ("tiny@0.85", "half"), ("tiny@low", "low"), ("tiny@0", "low"), ("tiny", "full")],
)
def test_the_models_name_may_fix_the_quality(web, model, levels):
    answer = web.post("/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 1})
    assert answer.headers["x-moe-prism-levels"] == levels


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "tiny@"}, 400, "model"),
        ({"model": "tiny@2"}, 400, "model"),
        ({"model": "tiny@nan"}, 400, "model"),
        ({"model": "tiny@superb"}, 400, "model"),
        ({"model": "small@1"}, 404, "model"),
        ({"model": "tiny@1@1"}, 404, "model"),
        ({"model": "tiny@half", "quality": 0.5}, 400, "quality"),
        ({"model": "tiny@half", "min_quality": 1.0}, 400, "min_quality"),
    ],
)
def test_a_wrong_name_is_refused(web, body, status, param):
    answer = web.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1, **body})
    assert answer.status_code == status and answer.json()["error"]["param"] == param


def with_harness():
    """A Python that has the harness: that of `make test-clients`, or ours."""
    python = Path(os.environ["CLIENTS"]) / "bin" / "python" if "CLIENTS" in os.environ else Path(sys.executable)
    code = "import lm_eval, aiohttp, tenacity"
    if not python.is_file() or subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
        pytest.skip(f"no 'lm_eval[api]' for {python}")
    return python


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.timeout(900)
def test_the_harness_itself(house, tmp_path):
    """Unchanged lm-eval over HTTP finds what it finds with unchanged transformers in its own memory."""
    python = with_harness()
    tasks = write_tasks(tmp_path / "tasks", questions=6, documents=2)
    length = house.built.service.context
    server = f"base_url={house.url}/completions,model=tiny@1,tokenizer={house.folder},num_concurrent=4,max_length={length}"
    served = harness(python, tmp_path / "local-completions", tasks, server, batch="2")
    # its windows are two tokens shorter over HTTP: one is generated, one is kept for the prefix
    own = f"pretrained={house.folder},dtype=float32,max_length={length - 2}"
    memory = harness(python, tmp_path / "hf", tasks, own, batch="1")
    assert served.keys() == memory.keys() and len(served) == 6
    for name, value in served.items():
        assert value == pytest.approx(memory[name], rel=1e-3), name


def harness(python, out, tasks, arguments, batch):
    """out: a folder of the name of lm-eval's kind of model."""
    folder = out.parent
    command = [python, "-m", "lm_eval", "--model", out.name, "--model_args", arguments, "--batch_size", batch, "--device", "cpu"]
    command += ["--include_path", str(tasks), "--tasks", ",".join(TASKS), "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    subprocess.run(command, check=True, timeout=600, env={**os.environ, **offline, "PYTHONPATH": ""})
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {
        (task, name): v
        for task, row in results.items()
        for name, v in row.items()
        if name.endswith(",none") and "stderr" not in name
    }

"""`moe-prism serve OUT --engine vllm` over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm.prompts import SHORT


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def server(nano_levels, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    program = str(Path(sys.executable).with_name("moe-prism"))
    command = [program, "serve", str(nano_levels), "--engine", "vllm", "--port", str(port), "--name", "nano"]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        until = time.monotonic() + 900
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def complete(server, **fields):
    body = {"model": "nano", "prompt": SHORT, "max_tokens": 16, "temperature": 0, **fields}
    status, answer = post(f"{server}/completions", body)
    assert status == 200, answer
    return [choice["text"] for choice in answer["choices"]]


def test_quality_through_the_api(server):
    full = complete(server)
    assert complete(server, vllm_xargs={"quality": "full"}) == full
    assert complete(server, vllm_xargs={"quality": 0.7}) != full


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quality": 2}, "quality is 2"),
        ({"quality": "best"}, "no operating point 'best'"),
        ({"quality": 0.7, "min_quality": 0.9}, "min_quality is above"),
        ({"tpot_ms": 5}, "tpot_ms is not available"),
    ],
)
def test_bad_fields_are_400(server, fields, words):
    status, answer = post(f"{server}/completions", {"model": "nano", "prompt": "x", "max_tokens": 1, "vllm_xargs": fields})
    assert status == 400 and words in json.dumps(answer)

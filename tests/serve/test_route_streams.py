"""Streams through a router: as they come, within bounds of time, size and places, and where an upstream or a client breaks off."""

from __future__ import annotations

import json
import threading
import time

import httpx2
import pytest

pytest.importorskip("fastapi")

from tests.serve.pool_house import ASK, open_pool, post, two


def test_a_stream_is_passed_on_as_it_comes(pair, tmp_path):
    gate = threading.Event()

    def answer(handler):
        handler.stream()
        handler.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')
        handler.wfile.flush()
        assert gate.wait(10)
        handler.wfile.write(b"data: [DONE]\n\n")

    pair[0].answer = answer
    with open_pool(tmp_path, two(*pair)) as house:
        with httpx2.stream("POST", house.url + "/v1/completions", json={**ASK, "stream": True}, timeout=30) as response:
            parts = response.iter_bytes()
            assert b'"a"' in next(parts) and not gate.is_set()  # it came before the upstream went on
            assert response.headers["content-type"].startswith("text/event-stream")
            gate.set()
            assert b"".join(parts) == b"data: [DONE]\n\n"
        house.idle()
        assert house.router.options.pace(0).first > 0


def test_a_stream_that_breaks_before_its_first_byte_is_asked_elsewhere_and_later_says_so(pair, tmp_path):
    def later(handler):
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("content-length", "999")
        handler.end_headers()
        handler.wfile.write(b"data: 1\n\n")
        handler.wfile.flush()
        handler.connection.shutdown(2)

    def early(handler):
        handler.stream()
        handler.wfile.flush()
        handler.connection.shutdown(2)

    pair[1].answer = lambda h: h.say(200, b"data: [DONE]\n\n", "text/event-stream")
    with open_pool(tmp_path, two(*pair)) as house:
        pair[0].answer = early
        assert post(house, stream=True).text == "data: [DONE]\n\n" and len(pair[1].asked) == 1
        pair[0].answer = later
        first, last = [line for line in post(house, stream=True).text.split("\n\n") if line]
        assert first == "data: 1" and json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream"
        assert len(pair[1].asked) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(pair, tmp_path, stream):
    gate = threading.Event()

    def answer(handler):
        if stream:
            handler.stream()
            handler.wfile.write(b"data: 1\n\n")
            handler.wfile.flush()
        gate.wait(10)

    pair[0].answer = answer
    with open_pool(tmp_path, two(*pair)) as house:
        try:
            with (
                httpx2.Client(timeout=0.5) as client,
                client.stream("POST", house.url + "/v1/completions", json={**ASK, "stream": stream}) as r,
            ):
                for _ in r.iter_bytes():
                    pass
        except httpx2.TimeoutException:
            pass
        try:
            house.idle(5)
        finally:
            gate.set()
        assert 'pool_requests_total{end="disconnect"} 1.0' in httpx2.get(house.url + "/metrics").text


def test_bounds_on_a_streams_time_and_size(pair, tmp_path):
    def endless(handler):
        handler.stream()
        for _ in range(100):
            handler.wfile.write(b"data: " + b"x" * 100 + b"\n\n")
            handler.wfile.flush()
            time.sleep(0.005)

    def still(handler):
        handler.stream()
        handler.wfile.write(b"data: 1\n\n")
        handler.wfile.flush()
        time.sleep(1)

    with open_pool(tmp_path, two(*pair), bounds={"answer_bytes": 1024, "idle_seconds": 0.2}) as house:
        for answer, words in ((endless, "too large"), (still, "too long")):
            pair[0].answer = answer
            text = post(house, stream=True).text
            assert words in text and len(text) < 3000


def test_a_full_upstream_is_passed_over_and_a_full_pool_says_503(pair, tmp_path):
    gate, inside = threading.Event(), threading.Barrier(3)

    def answer(handler):
        inside.wait(10)
        gate.wait(10)
        handler.say(200, {"choices": [{"text": "x"}]})

    pair[0].answer = pair[1].answer = answer
    upstreams = two(*pair)
    for each in upstreams:
        each["requests"] = 1
    with open_pool(tmp_path, upstreams) as house:
        threads = [threading.Thread(target=post, args=(house,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        inside.wait(10)
        full = post(house)
        gate.set()
        for thread in threads:
            thread.join(10)
        assert full.status_code == 503 and full.json()["error"]["code"] == "queue_requests"
        assert len(pair[0].asked) == len(pair[1].asked) == 1

"""Faults S01 to S09 of the server, at the size of a test: what a client can do to it, and to other clients."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx2

from tests.serve.house import open_house

PROMPT = "def main(args):\n    return "
BODY = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
LONG = {"prompt": PROMPT, "max_tokens": 110, "temperature": 0, "min_quality": 0.8}


@pytest.fixture
def web(house):
    with httpx2.Client(base_url=house.root, timeout=30) as made:
        yield made
        assert made.post("/v1/completions", json=BODY).status_code == 200  # whatever happened, it still serves


@pytest.fixture(scope="module")
def locked_house(tiny_levels):
    with open_house(tiny_levels, api_key="s3cret") as found:
        yield found


def raw(port, request, read=True):
    """Send bytes, return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        link.sendall(request)
        out = b""
        while read and (data := link.recv(65_536)):
            out += data
        return out


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'"text"', b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": NaN}', b"{}"],
    ids=["empty", "cut", "list", "number", "string", "null", "not-utf8", "deep-list", "deep-object", "nan", "no-prompt"],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_s01_malformed_bodies(web, route, body):
    answer = web.post(route, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413, 415, 422) and answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/xml", "multipart/form-data; boundary=x"])
def test_s01_wrong_content_types(web, kind):
    answer = web.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 2**31},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"n": 10**6},
        {"n": 0},
        {"stop": ["x"] * 10**5},
        {"stop": "x" * 300},
        {"temperature": -0.1},
        {"temperature": 1e300},
        {"top_p": 0},
        {"logprobs": 10**9},
        {"seed": 2**70},
        {"ttft_ms": -5},
        {"priority": 10**9},
        {"quality": 1.1},
        {"quality": "x" * 10**5},
        {"prompt": [[-1]]},
        {"prompt": [2**40]},
        {"prompt": []},
        {"prompt": ["x"] * 1000},
        {"prompt": "word " * 2000},
    ],
    ids=lambda f: f"{next(iter(f))}-{str(next(iter(f.values())))[:12]}",
)
def test_s03_numbers_and_sizes_out_of_bounds(web, fields):
    answer = web.post("/v1/completions", json={**BODY, **fields})
    assert answer.status_code == 400 and len(answer.content) < 1000


def test_s03_a_body_over_the_limit_is_refused_by_its_header_and_by_its_bytes(house, web):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert b" 413 " in raw(house.port, head + b"content-length: 104857600\r\n\r\n")
    chunk = b"%x\r\n" % 65_536 + b" " * 65_536 + b"\r\n"
    link = socket.create_connection(("127.0.0.1", house.port), timeout=20)
    with link:
        link.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        try:
            for _ in range(64):
                link.sendall(chunk)
        except OSError:
            pass  # it has closed on us, which is what we want
        first = link.recv(4096)
    assert b" 413 " in first


@pytest.mark.parametrize("when", ["before", "midway", "whole"])
def test_s04_a_client_that_leaves_frees_its_slot(house, web, when):
    generated = lambda: house.built.service.metrics.generated._value.get()  # noqa: E731
    for _ in range(8):
        body = json.dumps({**LONG, "stream": when != "whole"}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", house.port), timeout=20) as link:
            link.sendall(head % len(body) + body)
            if when == "midway":
                while b"data: " not in link.recv(65_536):
                    pass
            elif when == "whole":
                until = time.monotonic() + 10
                while house.built.service.engine.book == {} and time.monotonic() < until:
                    time.sleep(0.002)
    until, count = time.monotonic() + 10, -1
    while generated() != count:  # the last request may arrive after its client has left: then it ends at once
        assert house.idle() == [] and time.monotonic() < until
        count = generated()
        time.sleep(0.2)
    assert house.idle() == []  # nothing goes on generating
    assert when == "before" or house.built.service.metrics.disconnects._value.get() > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_s04_ten_thousand_clients_that_leave_at_any_moment(tiny_levels):
    """Before, while and after they are answered; sixteen at a time, so that most of them reach the engine."""
    count, at_once = int(os.environ.get("LEAVING", "10000")), 16
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

    def leave(port, seed):
        draw = random.Random(seed)
        for _ in range(count // at_once):
            body = json.dumps({**LONG, "stream": draw.random() < 0.5, "seed": draw.randrange(100)}).encode()
            with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
                link.sendall(head % len(body) + body[: draw.choice([None, None, None, len(body) // 2])])
                time.sleep(draw.random() ** 3 * 0.1)

    def files():
        return len(list(Path("/proc/self/fd").iterdir()))

    with open_house(tiny_levels) as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        assert web.post("/v1/completions", json=BODY).status_code == 200
        before = files()
        threads = [threading.Thread(target=leave, args=(house.port, i)) for i in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until = time.monotonic() + 60
        while house.built.service.engine.book and time.monotonic() < until:
            time.sleep(0.1)
        assert house.built.service.engine.book == {} and house.idle() == []
        assert web.post("/v1/completions", json=BODY).status_code == 200  # and somebody who stays is answered
        while files() > before + 4 and time.monotonic() < until:
            time.sleep(0.1)
        assert files() <= before + 4
        assert house.built.service.metrics.disconnects._value.get() > count // 100  # the others left before anything was begun


def test_s05_a_reader_that_stalls_is_dropped(tiny_levels):
    with open_house(tiny_levels, {"bounds": {"write_seconds": 0.3}}) as house:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.connect(("127.0.0.1", house.port))
        # more than all buffers on the way hold, and nobody reads it
        body = json.dumps({**LONG, "max_tokens": 110, "n": 4, "logprobs": 20, "temperature": 1, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        with link, httpx2.Client(base_url=house.root, timeout=30) as web:
            link.sendall(head % len(body) + body)
            assert web.post("/v1/completions", json=BODY).status_code == 200  # neighbours are served
            until = time.monotonic() + 60
            while "slow_reader" not in refusals(house) and time.monotonic() < until:
                time.sleep(0.05)
            assert "slow_reader" in refusals(house)
        assert house.idle() == []


def refusals(house):
    """Reasons for which something was refused so far."""
    lines = house.built.service.metrics.text().decode().splitlines()
    rows = [line for line in lines if line.startswith("moe_prism:requests_refused_total") and not line.endswith(" 0.0")]
    return {row.split('reason="')[1].split('"')[0] for row in rows}


def test_s06_slow_headers_and_bodies_are_closed(tiny_levels):
    with open_house(tiny_levels, {"bounds": {"header_seconds": 0.4, "body_seconds": 0.4}}) as house:
        assert raw(house.port, b"") == b"" and raw(house.port, b"POST /v1/comp") == b""
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"
        assert b" 408 " in raw(house.port, head)
        assert {"slow_body"} <= refusals(house) and house.idle() == []


async def storm(house, count, gap, body):
    """`count` requests, one every `gap` seconds whatever becomes of the others. -> [(status, retry-after, queue length)]"""
    async with httpx2.AsyncClient(base_url=house.root, timeout=60, limits=httpx2.Limits(max_connections=500)) as web:

        async def one():
            answer = await web.post("/v1/completions", json=body)
            return answer.status_code, answer.headers.get("retry-after"), house.built.door.requests

        tasks = []
        for _ in range(count):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(gap)
        return await asyncio.gather(*tasks)


def test_s07_s08_overload_is_refused_in_time_and_forgotten_after(tiny_levels):
    bounds = {"queue_requests": 4}
    with open_house(tiny_levels, {"bounds": bounds}, policy="elastic") as house:
        results = asyncio.run(storm(house, 150, 0.004, {**LONG, "max_tokens": 60}))
        statuses = {status for status, _, _ in results}
        assert statuses == {200, 503}
        assert all(int(retry) >= 1 for status, retry, _ in results if status == 503)
        assert max(queue for _, _, queue in results) <= 4 + 4  # running and waiting
        assert house.idle() == []
        assert {status for status, _, _ in asyncio.run(storm(house, 10, 0.1, BODY))} == {200}


def test_s09_a_low_class_cannot_take_the_places_of_a_high_one(tiny_levels):
    classes = {"high": {"min_quality": 0.9, "ttft_ms": 2000, "priority": 0}, "low": {"priority": 2}}
    config = {"classes": classes, "default_class": "low", "bounds": {"queue_requests": 8, "reserved": 0.5}}
    with open_house(tiny_levels, config, policy="elastic") as house:

        async def both():
            low = asyncio.create_task(storm(house, 120, 0.005, {**LONG, "class": "low", "max_tokens": 60}))
            async with httpx2.AsyncClient(base_url=house.root, timeout=60) as web:
                high = [(await web.post("/v1/completions", json={**BODY, "class": "high"})).status_code for _ in range(10)]
            return await low, high

        low, high = asyncio.run(both())
        assert set(high) == {200}
        assert sum(status == 200 for status, _, _ in low) >= 6 and 503 in {status for status, _, _ in low}
        assert house.idle() == []


def test_a_request_past_its_deadline_ends(tiny_levels):
    with open_house(tiny_levels, {"bounds": {"request_seconds": 0.001}}) as house:
        answer = httpx2.post(house.root + "/v1/completions", json=LONG)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline" and house.idle() == []


def test_x02_every_route_with_data_needs_the_key(tiny_levels):
    with open_house(tiny_levels, api_key="s3cret") as house, httpx2.Client(base_url=house.root) as web:
        paths = [
            *web.get("/openapi.json", headers={"authorization": "Bearer s3cret"}).json()["paths"],
            "/openapi.json",
            "/nowhere",
        ]
        assert len(paths) >= 7
        for path in paths:
            for given in (
                {},
                *({"authorization": v} for v in ("Bearer", "Bearer s3cre", "Bearer S3CRET", "s3cret", "Basic s3cret")),
            ):
                for method in ("GET", "POST", "OPTIONS") if not given else ("GET",):
                    status = web.request(method, path, headers=given).status_code
                    is_open = path in ("/health", "/ready", "/status")  # the page asks for the key before it shows anything
                    assert status == (401 if not is_open else 200 if method == "GET" else 405), (method, path, given)
        assert web.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert web.get("/v1/models", headers={"x-api-key": "s3cret"}).status_code == 401
        said = [web.get("/ready", headers=h).json() for h in ({}, {"authorization": "Bearer s3cret"})]
        assert said == [{"status": "ready"}, {"status": "ready", "policy": "fifo", "requests": 0}]  # probes have no key


def test_x02_two_keys_in_one_request_are_refused_on_every_route_that_needs_one(tiny_levels):
    with open_house(tiny_levels, api_key="s3cret") as house:
        right, wrong = b"authorization: Bearer s3cret\r\n", b"Authorization: Bearer x\r\n"
        for path in (b"/v1/models", b"/v1/completions", b"/metrics", b"/status.json", b"/openapi.json", b"/nowhere"):
            for pair in (right + wrong, wrong + right, right + right):
                said = raw(house.port, b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%s\r\n" % (path, pair))
                head, _, body = said.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
                assert b"more than one Authorization" in body and b"\n" not in body


@pytest.mark.parametrize(
    "key", [b"", b"authorization: Bearer s3cret\r\n", b"authorization: Bearer x\r\n"], ids=["none", "right", "wrong"]
)
@pytest.mark.parametrize("path", [b"/v1/completions", b"/health", b"/nowhere"])
def test_s01_a_body_of_two_lengths_is_refused_and_its_connection_ends(locked_house, path, key):
    """What the next request on the connection is would depend on who reads: nothing after the head is answered."""
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%s" % (path, key)
    for lengths in (
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    ):
        said = raw(locked_house.port, head + lengths + b"\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert said.count(b"HTTP/1.1 ") == 1 and b"HTTP/1.1 400 " in said and b"connection: close" in said.lower()
        body = said.partition(b"\r\n\r\n")[2]
        assert "Transfer-Encoding" in json.loads(body)["error"]["message"] and b"\n" not in body


@pytest.mark.slow
def test_x02_how_much_of_a_key_is_right_cannot_be_told_from_the_time():
    """Medians of blocks, the two kinds in turns, so that what else the machine does meets both."""
    from scipy.stats import mannwhitneyu

    from moe_prism.serve.http.guard import Keys
    from moe_prism.serve.http.refusal import Refusal

    key = "s3cret" * 8
    keys, shown = Keys([key]), {"right": key[:-1] + "x", "wrong": "x" + key[1:]}
    headers = {kind: b"Bearer " + text.encode() for kind, text in shown.items()}
    times: dict[str, list[float]] = {kind: [] for kind in headers}
    for block in range(1000):
        for kind in sorted(headers, reverse=block % 2):
            taken = []
            for _ in range(50):
                began = time.perf_counter_ns()
                try:
                    keys.check([headers[kind]])
                except Refusal:
                    taken.append(time.perf_counter_ns() - began)
            times[kind].append(sorted(taken)[len(taken) // 2])
    assert sum(map(len, times.values())) == 2000 and mannwhitneyu(times["right"], times["wrong"]).pvalue > 0.05, times


def test_x04_prompts_are_in_no_log_and_no_metric(house, web, caplog):
    marker = "MARKER_ZEBRA_7"
    with caplog.at_level("DEBUG"):
        web.post("/v1/completions", json={**BODY, "prompt": marker, "user": marker})
        web.post("/v1/completions", json={**BODY, "prompt": marker, "n": 999})
        bad = web.post("/v1/completions", json={**BODY, "prompt": {"deep": marker}})
        web.post("/v1/completions", content=b'{"prompt": "' + marker.encode())
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert ours and not any(marker in str(vars(r)) for r in ours)
    assert marker not in house.built.service.metrics.text().decode() and marker not in bad.text


def test_s22_unknown_labels_make_no_series(house, web):
    before = len(house.built.service.metrics.text().splitlines())
    for i in range(30):
        web.post("/v1/completions", json={**BODY, "class": f"c{i}", "model": f"m{i}"})
        web.get(f"/v1/c{i}")
    assert len(house.built.service.metrics.text().splitlines()) <= before + 4


def test_threads_and_files_return_to_what_they_were(tiny_levels):
    before = threading.active_count()
    for _ in range(2):
        with open_house(tiny_levels) as house:
            httpx2.post(house.root + "/v1/completions", json=BODY)
    assert threading.active_count() <= before + 1

"""Attacks on a server beside normal clients: what is asked for must be bounded before it is paid for. Sizes of a test; the figures of the
whole attack come from `benchmarks/attacks.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

pytest.importorskip("fastapi")

from moe_prism.serve.config import Bounds
from moe_prism.serve.http import draining, guard
from moe_prism.serve.http.crowd import BURST, PACE, Crowd, Doorway
from moe_prism.serve.text.workers import ENDED
from tests.faults.test_engine_process import gone
from tests.faults.test_server import raw
from tests.serve.house import open_house

GROWS = "{% set ns = namespace(t='x' * 1000) %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
BODY = {"prompt": "def main(", "max_tokens": 2, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def served(house):
    return httpx2.post(house.root + "/v1/completions", json=BODY, timeout=60).status_code == 200


@pytest.fixture(scope="module")
def hostile(tiny_levels, tmp_path_factory):
    """A server of a folder whose chat template never ends, and whose context would take long texts."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(tiny_levels, folder)
    (folder / "chat_template.jinja").write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x")
    with open_house(folder, {"bounds": {"text_seconds": 0.3}}) as house:
        yield house


def test_s03_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(hostile):
    workers = hostile.built.house.workers
    before = workers.pids()
    for text in ("7" * 1_000_000, "漢" * 300_000):
        answer = httpx2.post(hostile.root + "/v1/completions", json={**BODY, "prompt": text}, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert workers.pids() == before  # nobody worked


def test_s03_large_bodies_come_in_one_at_a_time(hostile):
    """And small ones beside them."""
    answers: list[int] = []
    body = json.dumps({**BODY, "prompt": "7" * 900_000}).encode()

    def send():
        answers.append(httpx2.post(hostile.root + "/v1/completions", content=body, timeout=60).status_code)

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert served(hostile)
    for thread in threads:
        thread.join(60)
    assert answers == [400] * 12 and served(hostile) and hostile.idle() == []


def test_s03_a_place_is_reserved_before_anything_is_tokenized(tiny_levels):
    with open_house(tiny_levels, {"bounds": {"queue_requests": 1}}) as house:
        for _ in range(3):
            house.built.door.enter(1, 1, house.built.service.config.classes["interactive"])
        place = house.built.door.enter(2, 1, house.built.service.config.classes["interactive"])
        refused = httpx2.post(house.root + "/v1/completions", json=BODY)
        assert refused.status_code == 503 and house.built.house.workers.pids() == []
        place.leave()
        house.built.door.requests = 0


def test_s03_a_long_text_that_is_cut_costs_its_time_and_no_more(hostile):
    """truncate_prompt_tokens lets it in: the process that works on it is killed, and the next one serves."""
    answer = httpx2.post(
        hostile.root + "/v1/completions", json={**BODY, "prompt": "ab" * 500_000, "truncate_prompt_tokens": 4}, timeout=60
    )
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] == "too_costly"
    assert served(hostile)


def test_x01_a_template_without_end_is_ended(hostile):
    answers: list[httpx2.Response] = []

    def chat():
        body = {"messages": [{"role": "user", "content": "x"}]}
        answers.append(httpx2.post(hostile.root + "/v1/chat/completions", json=body, timeout=60))

    assert served(hostile)
    text = set(hostile.built.house.workers.pids())
    threads = [threading.Thread(target=chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    served_meanwhile, priorities = 0, set[int]()
    while any(thread.is_alive() for thread in threads):
        served_meanwhile += served(hostile)
        for pid in set(hostile.built.house.workers.pids()) - text:
            with contextlib.suppress(ProcessLookupError):
                priorities.add(os.getpriority(os.PRIO_PROCESS, pid))
        assert httpx2.get(hostile.root + "/health").status_code == 200
        time.sleep(0.05)  # a processor that is always wanted would leave theirs none
    assert served_meanwhile >= 2 and 19 in priorities  # it gets only what nobody else wants
    assert [(a.status_code, a.json()["error"]["code"], a.json()["error"]["param"]) for a in answers] == [
        (400, "too_costly", "messages")
    ] * 4
    assert text <= set(hostile.built.house.workers.pids())  # those for texts were not touched
    assert hostile.idle() == []


def test_x01_a_template_that_takes_memory_is_ended(tiny_levels, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_levels, folder)
    (folder / "chat_template.jinja").write_text(GROWS)
    with open_house(folder, {"bounds": {"text_bytes": 128 << 20, "text_seconds": 5}}) as house:
        answer = httpx2.post(
            house.root + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=60
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages" and served(house)


def test_the_processes_for_texts_end_with_the_server(tiny_levels):
    with open_house(tiny_levels) as house:
        assert served(house)
        pids = [*house.built.house.workers.pids(), house.built.house.workers._nursery._pid]
        assert len(pids) == 2 and not any(Path(f"/proc/{pid}/cmdline").read_bytes() == b"" for pid in pids)
    assert all(gone(pid) for pid in pids)


def test_s12_a_process_for_texts_that_is_killed_is_replaced(tiny_levels):
    with open_house(tiny_levels) as house:
        assert served(house)
        (before,) = house.built.house.workers.pids()
        os.kill(before, signal.SIGKILL)
        assert gone(before) and served(house) and house.built.house.workers.pids() != [before]


def test_s12_a_server_that_can_read_no_text_says_so_and_ends(tiny_levels, monkeypatch):
    """Who forks the processes for texts is not to be replaced: a process with threads cannot fork."""
    monkeypatch.setattr(draining, "FAREWELL", 2.0)
    with open_house(tiny_levels) as house:
        assert served(house)
        nursery = house.built.house.workers._nursery._pid
        os.kill(nursery, signal.SIGKILL)
        assert gone(nursery)
        refused = httpx2.post(house.root + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine")
        until = time.monotonic() + 30
        with pytest.raises(httpx2.HTTPError):
            while time.monotonic() < until:
                httpx2.get(house.root + "/health", timeout=1)
        assert house.built.ended() == ENDED


def test_a_worker_holds_no_socket_of_ours(tiny_levels):
    with open_house(tiny_levels) as house:
        assert served(house)
        for pid in house.built.house.workers.pids():
            links = [str(p.readlink()) for p in Path(f"/proc/{pid}/fd").iterdir()]
            assert sum(link.startswith("socket:") for link in links) == 1


@pytest.fixture(scope="module")
def hurried(tiny_levels):
    """A server with short deadlines and few connections."""
    bounds = {"header_seconds": 0.5, "body_seconds": 0.5, "connections": 20, "connections_per_client": 12}
    with open_house(tiny_levels, {"bounds": bounds}, api_key="k") as house:
        yield house


def trickle(port, head, seconds, byte=b"{", every=0.1):
    """Seconds until the server closed a connection that is sent one byte now and then, and what it said; None if it never did."""
    with socket.create_connection(("127.0.0.1", port), timeout=every) as link:
        began, said = time.monotonic(), b""
        with contextlib.suppress(OSError):
            link.sendall(head)
            while time.monotonic() - began < seconds:
                try:
                    if not (got := link.recv(65_536)):
                        return time.monotonic() - began, said
                    said += got
                except TimeoutError:
                    link.sendall(byte)
            return None, said
        return time.monotonic() - began, said


LONG = b"content-length: 5000\r\n\r\n"
SLOW = {
    "nothing": b"",
    "part of a request line": b"POST /v1",
    "part of the headers": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
    "a body that is read": HEAD + b"authorization: Bearer k\r\n" + LONG,
    "a chunked one": HEAD + b"authorization: Bearer k\r\ntransfer-encoding: chunked\r\n\r\n",
    "a body without a key": HEAD + LONG,
    "GET /health": b"GET /health HTTP/1.1\r\nhost: x\r\n" + LONG,
    "POST /health": b"POST /health HTTP/1.1\r\nhost: x\r\n" + LONG,
    "GET /status": b"GET /status HTTP/1.1\r\nhost: x\r\n" + LONG,
    "GET /v1/models": b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n" + LONG,
    "no route": b"POST /nowhere HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n" + LONG,
    "a second request": b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea",
}


@pytest.mark.parametrize("kind", SLOW)
def test_s06_every_part_of_a_request_has_an_absolute_deadline(hurried, kind):
    seconds, said = trickle(hurried.port, SLOW[kind], 20, byte=b"x" if "chunked" not in kind else b"1\r\nx\r\n")
    assert seconds is not None
    if kind.startswith(("GET /health", "GET /status", "a second")):
        assert said.startswith(b"HTTP/1.1 200")
    if kind == "a body without a key":
        assert b" 401 " in said


def test_s06_a_new_connection_is_let_in_while_others_wait(tiny_levels):
    bounds = {"connections": 20, "connections_per_client": 12, "header_seconds": 60, "body_seconds": 60}
    with open_house(tiny_levels, {"bounds": bounds}) as house:
        held = []
        for i in range(60):
            link = socket.socket()
            link.bind((f"127.0.0.{2 + i % 3}", 0))  # three clients beside the normal one
            link.connect(("127.0.0.1", house.port))
            link.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" if i % 2 else HEAD + LONG)
            held.append(link)
        assert served(house) and httpx2.get(house.root + "/health").status_code == 200
        for link in held:
            link.close()


class Connected:
    """One of a crowd, which notes that it had to go."""

    def __init__(self, name, gone):
        self.drop = lambda: gone.append(name)


def test_s06_an_address_opens_so_many_connections_a_second_where_there_are_many():
    now = 100.0
    crowd = Crowd(Bounds(connections=20, connections_per_client=12), lambda: now)
    clients = [Connected("", []) for _ in range(12)]
    for i, client in enumerate(clients):
        assert crowd.hears("a") and crowd.enter(client, "b" if i % 2 else "a")
    assert [crowd.hears("a") for _ in range(20)] == [True] * int(BURST) + [False] * (20 - int(BURST))
    assert crowd.hears("b")  # another address has its own
    crowd.work(clients[0])
    assert crowd.hears("a") and not crowd.hears("a")  # a request that was complete gave one back
    now += 3.5 / PACE
    assert [crowd.hears("a") for _ in range(4)] == [True] * 3 + [False]
    crowd.leave(clients[0], "a")
    assert all(crowd.hears("a") for _ in range(100))  # few again


def test_s06_who_is_not_heard_is_closed_and_costs_nothing():
    with Doorway() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        listening.crowd = SimpleNamespace(hears=lambda address: False)
        with socket.create_connection(listening.getsockname(), timeout=10) as link:
            with pytest.raises(BlockingIOError):
                listening.accept()
            with pytest.raises(ConnectionResetError):
                link.recv(1)
        listening.crowd = None
        with socket.create_connection(listening.getsockname(), timeout=10) as link:
            taken, address = listening.accept()
            taken.close()
            assert address == link.getsockname()


def test_s06_a_newcomer_takes_the_place_of_its_own_address_first():
    crowd, gone = Crowd(Bounds(connections=4, connections_per_client=3)), list[str]()
    for name in ("other", "a", "b", "c"):
        crowd.enter(Connected(name, gone), "other" if name == "other" else "many")
    for name in ("d", "e"):
        assert crowd.enter(Connected(name, gone), "many")
    assert gone == ["a", "b"] and crowd.count == 4


def test_s03_large_bodies_come_one_at_a_time_however_soon_they_are_refused(tiny_levels, monkeypatch):
    monkeypatch.setattr(guard, "PAUSE", 0.5)
    answers: list[int] = []
    with open_house(tiny_levels) as house:

        def send():
            answers.append(httpx2.post(house.root + "/v1/completions", json={"prompt": "7" * 400_000}, timeout=60).status_code)

        began, threads = time.monotonic(), [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert time.monotonic() - began >= 3 * 0.5 and set(answers) <= {400, 503} and len(answers) == 4


@pytest.mark.parametrize("cut", [1, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (7, 1000))])
def test_a_head_that_comes_in_pieces_is_read_once_it_ends(tiny_levels, cut):
    body = b'{"prompt": "a"}'
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    sent = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + head + body
    with open_house(tiny_levels) as house, socket.create_connection(("127.0.0.1", house.port), timeout=120) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(sent), cut):
            link.sendall(sent[i : i + cut])
        said = b""
        while data := link.recv(65_536):
            said += data
    assert said.count(b"HTTP/1.1 200") == 2, said


def test_s06_where_all_work_a_new_connection_is_told_in_json(tiny_levels):
    bounds = {"connections": 2, "connections_per_client": 2, "header_seconds": 1.0}
    with open_house(tiny_levels, {"bounds": bounds}) as house:
        body = json.dumps({"prompt": "a", "max_tokens": 120, "stream": True, "ignore_eos": True}).encode()
        held = []
        for _ in range(2):
            link = socket.create_connection(("127.0.0.1", house.port), timeout=20)
            link.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            link.recv(100)
            held.append(link)
        head = b"%s /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        probes = [raw(house.port, head % method) for method in (b"GET", b"HEAD")]
        refused = [raw(house.port, sent) for sent in (b"", b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")]
        working = house.built.door.requests
        for link in held:
            link.close()
        assert all(said.startswith(b"HTTP/1.1 200 ") for said in probes)
        for said in refused * (working == 2):  # else one of them had ended
            assert (
                said.startswith(b"HTTP/1.1 503 ") and json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections"
            )
        assert house.idle() == []


def test_bytes_that_are_no_http_are_told_so_in_json(tiny_levels):
    with open_house(tiny_levels) as house:
        said = raw(house.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert (
            said.startswith(b"HTTP/1.1 400 ") and json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request"
        )
        large = b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 17_000 + b"\r\n\r\n"
        assert raw(house.port, large)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400")

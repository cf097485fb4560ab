"""A pool behind one endpoint: who gets a request, what happens where an upstream fails, and what a file may say."""

from __future__ import annotations

import socket
import threading
import time

import httpx2
import pytest

pytest.importorskip("fastapi")

from moe_prism.errors import UsageError
from moe_prism.serve.route.options import AnswerTimes, RequestLimits
from tests.serve.pool_house import ASK, LEVELS, listed, nowhere, open_pool, post, said, two


def test_a_request_gets_the_cheapest_option_that_meets_its_quality(pair, tmp_path):
    small, large = pair
    with open_pool(tmp_path, two(*pair)) as house:
        assert said(post(house)) == ("small", "small@low")
        assert small.asked[-1] == {**ASK, "model": "s", "quality": "low"}
        assert said(post(house, min_quality=0.85)) == ("small", "small@full")
        assert small.asked[-1]["quality"] == "full" and "min_quality" not in small.asked[-1]
        assert said(post(house, quality=0.95, ttft_ms=500, priority=1)) == ("large", "large@full")
        assert large.asked[-1] == {**ASK, "model": "l", "priority": 1}
        assert said(post(house, model="pool@0.8")) == ("small", "small@full")
        assert said(post(house, model="large", **{"class": "batch"})) == ("large", "large@full")
        answer = post(house, model="large", **{"class": "batch"})
        assert answer.headers["x-moe-prism-ignored"] == "class" and "class" not in large.asked[-1]
        assert said(post(house, model="small@full")) == ("small", "small@full")
        assert post(house).headers["x-moe-prism-point"] == "low"


def test_load_may_lower_a_quality_that_is_not_fixed(pair, tmp_path):
    small, _ = pair
    with open_pool(tmp_path, two(*pair), chooser="cheapest") as house:
        for level in house.router.options.every:
            assert level.quality <= 1
        house.router.options.chooser.options[0] = house.router.options.every[0].__class__("small", "low", 0.72, 9.0)
        assert said(post(house, min_quality=0.7)) == ("small", "small@full")
        assert small.asked[-1]["quality"] == "full" and small.asked[-1]["min_quality"] == "low"
        assert said(post(house, quality=0.7)) == ("small", "small@full") and "min_quality" not in small.asked[-1]


REFUSED = [
    ({"quality": 1.0, "model": "small"}, 400, "invalid_value", "the highest is 0.900 of 'small@full'"),
    ({"quality": "ful"}, 400, "invalid_value", "did you mean 'full'"),
    ({"model": "lage"}, 404, "model_not_found", "no model 'lage'"),
    ({"model": "pool@2"}, 400, "invalid_value", "from 0 to 1"),
    ({"model": "pool@0.5", "quality": 0.5}, 400, "invalid_value", "both ask"),
    ({"quality": 0.5, "min_quality": 0.6}, 400, "invalid_value", "above quality"),
    ({"quality": "full", "min_quality": 0.6}, 400, "invalid_value", "cannot lower"),
    ({"min_quality": "low"}, 400, "invalid_value", "as a number"),
    ({"quality": True}, 400, "invalid_value", "quality"),
    ({"ttft_ms": 0}, 400, "invalid_value", "ttft_ms"),
    ({"stream": "yes"}, 400, "invalid_value", "stream"),
]


def test_limits_that_cannot_be_met_are_refused_by_name(pair, tmp_path):
    with open_pool(tmp_path, two(*pair)) as house:
        for fields, status, code, words in REFUSED:
            answer = post(house, **fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code) and words in error["message"], fields
            assert "7f3a" not in answer.text and not pair[0].asked and not pair[1].asked


def test_bodies_that_are_none(pair, tmp_path):
    with open_pool(tmp_path, two(*pair)) as house:
        url, head = house.url + "/v1/completions", {"content-type": "application/json"}
        for body, status in ((b"[1]", 400), (b"{", 400), (b"[" * 100_000, 400), (b'{"x": NaN}', 400), (b"x" * (1 << 21), 413)):
            answer = httpx2.post(url, content=body, headers=head, timeout=30)
            assert answer.status_code == status and "error" in answer.json()


FAILURES = {
    "error inside": lambda h: h.say(500, {"error": {}}),
    "full": lambda h: h.say(503, {"error": {}}, retry_after="7"),
    "too many": lambda h: h.say(429, {"error": {}}),
    "key": lambda h: h.say(401, {"error": {}}),
    "gone": lambda h: h.say(404, {"error": {}}),
    "page": lambda h: h.say(200, b"<html>", "text/html"),
    "empty": lambda h: h.say(200, b""),
    "no json": lambda h: h.say(200, b"{"),
    "a list": lambda h: h.say(200, b"[1]"),
    "deep": lambda h: h.say(200, b"[" * 50_000),
    "redirect": lambda h: h.say(302, b"", location="http://127.0.0.1:1/"),
    "squeezed": lambda h: h.say(200, b"{}", content_encoding="gzip"),
    "cut short": lambda h: (h.say(200, b"{}", content_length="9"), h.wfile.flush(), h.connection.shutdown(2)),
    "nothing": lambda h: h.connection.shutdown(2),
    "large": lambda h: h.say(200, b'{"x": "' + b"y" * 5000 + b'"}'),
    "error without form": lambda h: h.say(400, b"no"),
}


def test_where_an_upstream_fails_before_its_answer_another_one_answers(pair, tmp_path):
    with open_pool(tmp_path, two(*pair), bounds={"answer_bytes": 4096}) as house:
        for number, (name, failure) in enumerate(FAILURES.items(), 1):
            house.up("small", "large")
            pair[0].answer = failure
            assert said(post(house)) == ("large", "large@full"), name
            assert len(pair[0].asked) == len(pair[1].asked) == number, name
            assert f'pool_upstream_failures_total{{upstream="small"}} {number}.0' in httpx2.get(house.url + "/metrics").text


def test_where_all_fail_it_says_so(pair, tmp_path):
    pair[0].answer, pair[1].answer = FAILURES["full"], FAILURES["error inside"]
    with open_pool(tmp_path, two(*pair)) as house:
        answer = post(house)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "upstreams"
        assert answer.json()["error"]["message"] == "no upstream answered (small: status 503; large: status 500)"
        assert answer.headers["retry-after"] == "7"


def test_tries_are_bounded(pair, tmp_path):
    pair[0].answer = FAILURES["full"]
    with open_pool(tmp_path, two(*pair), bounds={"tries": 1}) as house:
        assert post(house).status_code == 503 and not pair[1].asked


def test_an_error_of_the_request_is_passed_on_and_not_tried_elsewhere(pair, tmp_path):
    body = {"error": {"message": "n is above 16", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}}
    pair[0].answer = lambda h: h.say(400, body)
    with open_pool(tmp_path, two(*pair)) as house:
        answer = post(house, n=99)
        assert answer.status_code == 400 and answer.json() == body and not pair[1].asked


def test_a_slow_upstream_is_left_for_another_one(pair, tmp_path):
    pair[0].answer = lambda h: (time.sleep(1.5), h.say(200, {}))
    with open_pool(tmp_path, two(*pair), bounds={"first_byte_seconds": 0.2}) as house:
        assert said(post(house)) == ("large", "large@full")


def test_an_upstream_that_is_gone_is_found_again(pair, tmp_path):
    small, large = pair
    with open_pool(tmp_path, [*two(small, large), {"name": "dead", "url": nowhere(), "cost": 0.1}]) as house:
        house.up("small", "large")
        assert said(post(house)) == ("small", "small@low")
        small.models = {"data": []}
        house.up("large")
        assert said(post(house)) == ("large", "large@full")
        assert post(house, model="small").json()["error"]["code"] == "upstreams"
        assert post(house, model="dead").status_code == 503 and int(post(house, model="dead").headers["retry-after"]) >= 1
        assert httpx2.get(house.url + "/ready").status_code == 200
        large.models = {"data": "x"}
        house.up()
        assert httpx2.get(house.url + "/ready").json() == {"status": "no upstream"}
        assert httpx2.get(house.url + "/health").status_code == 200 and post(house).status_code == 503
        small.models = listed("s", LEVELS)
        house.up("small")
        assert said(post(house)) == ("small", "small@low")


LISTS = [
    {"data": [{"id": "s", "operating_points": [{"name": "x", "quality": 2, "slots": 1}]}]},
    {"data": [{"id": "s" * 300}]},
    {"data": [{"id": "other"}] * 5000},
    [],
    b"{" * 10_000,
    b'{"data": [' + b'{"id": "s"},' * 200_000 + b'{"id": "s"}]}',
]


def test_a_hostile_list_of_models_leaves_the_others_alone(pair, tmp_path):
    with open_pool(tmp_path, two(*pair)) as house:
        for models in LISTS:
            pair[0].models = models
            house.up("large")
            assert said(post(house)) == ("large", "large@full")
            pair[0].models = listed("s", LEVELS)
            house.up("small", "large")


def test_options_that_change_under_a_request_change_nothing_of_it(pair, tmp_path):
    gate, inside = threading.Event(), threading.Event()

    def answer(handler):
        inside.set()
        gate.wait(10)
        handler.say(200, b"data: [DONE]\n\n", "text/event-stream")

    small, large = pair
    large.answer, found = answer, []
    with open_pool(tmp_path, two(*pair)) as house:
        thread = threading.Thread(target=lambda: found.append(post(house, quality=1.0, stream=True)))
        thread.start()
        assert inside.wait(10)
        small.models = listed("s", LEVELS[:1])  # the numbers of the options move
        while len(house.router.options.every) != 2:
            time.sleep(0.02)
        gate.set()
        thread.join(10)
        assert found[0].headers["x-moe-prism-upstream"] == "large@full"
        house.idle()
        assert [u.running for u in house.router.upstreams] == [0, 0]


def test_what_goes_along_and_what_does_not(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_KEY", "theirs")
    upstreams = two(*pair)
    upstreams[0]["key_variable"] = "POOL_KEY"
    with open_pool(tmp_path, upstreams, keys=("ours",)) as house:
        assert post(house).status_code == 401 and httpx2.get(house.url + "/v1/models").status_code == 401
        assert httpx2.get(house.url + "/health").status_code == 200
        headers = {"authorization": "Bearer ours", "x-request-id": "r-1", "cookie": "secret", "x-other": "1"}
        answer = post(house, headers=headers)
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "r-1"
        sent = pair[0].headers[-1]
        assert sent["authorization"] == "Bearer theirs" and sent["x-request-id"] == "r-1"
        assert "cookie" not in sent and "x-other" not in sent
    monkeypatch.delenv("POOL_KEY")
    with pytest.raises(UsageError, match="POOL_KEY of upstream 'small' is not set"), open_pool(tmp_path, upstreams):
        pass


def test_a_header_of_an_upstream_is_passed_on_where_it_is_plain(pair, tmp_path):
    with open_pool(tmp_path, two(*pair)) as house:
        for value, passed in (("low", "low"), ("caf\u00e9", None), ("x" * 2000, None)):
            pair[0].answer = lambda h, value=value: h.say(200, {"choices": []}, x_moe_prism_point=value, x_secret="1")
            answer = post(house)
            assert answer.headers.get("x-moe-prism-point") == passed and "x-secret" not in answer.headers


def test_connections_have_the_deadlines_and_bounds_of_a_server(pair, tmp_path):
    bounds = {"header_seconds": 0.3, "body_seconds": 0.3, "connections": 2}
    with open_pool(tmp_path, two(*pair), bounds=bounds) as house:
        port = int(house.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 10) as slow:
            slow.sendall(b"POST /v1/comp")
            assert slow.recv(100) == b""  # closed, unanswered
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", port), 10) as slow:
            slow.sendall(head)
            assert b"408" in slow.recv(100)
        twice = b"content-length: 2\r\ntransfer-encoding: chunked\r\n"
        with socket.create_connection(("127.0.0.1", port), 10) as odd:
            odd.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + twice + b"\r\n{}")
            assert b" 400 " in odd.recv(100)
    assert not pair[0].asked and not pair[1].asked


def test_a_drain_ends_what_was_begun_and_takes_nothing_new(pair, tmp_path):
    gate, inside = threading.Event(), threading.Event()

    def answer(handler):
        inside.set()
        gate.wait(10)
        handler.say(200, {"choices": [{"text": "x"}]})

    pair[0].answer, found = answer, []
    with open_pool(tmp_path, two(*pair)) as house:
        thread = threading.Thread(target=lambda: found.append(post(house)))
        thread.start()
        assert inside.wait(10)
        house.router.door.leaving = house.router.door.draining = True
        late = post(house)
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        assert httpx2.get(house.url + "/ready").json() == {"status": "draining"}
        gate.set()
        thread.join(10)
        assert found[0].status_code == 200


def test_models_and_metrics_say_what_there_is(pair, tmp_path):
    with open_pool(tmp_path, [*two(*pair), {"name": "dead", "url": nowhere()}], name="mine") as house:
        post(house)
        data = httpx2.get(house.url + "/v1/models").json()["data"]
        assert [d["id"] for d in data] == ["mine", "small", "large", "dead", "small@low", "small@full", "large@full"]
        assert data[0]["options"][0] == {"name": "small@low", "quality": 0.72, "cost": 0.25, "up": True, "used": True}
        assert httpx2.get(house.url + "/v1/models/large@full").json()["options"][0]["quality"] == 1.0
        assert httpx2.get(house.url + "/v1/models/none").status_code == 404
        text = httpx2.get(house.url + "/metrics").text
        for line in (
            'pool_upstream_up{upstream="dead"} 0.0',
            'pool_answers_total{upstream="small"} 1.0',
            'pool_requests_total{end="stop"} 1.0',
        ):
            assert f"moe_prism:{line}" in text
        assert "7f3a" not in text


def test_chats_go_the_same_way_and_the_last_message_is_the_question(pair, tmp_path):
    with open_pool(tmp_path, two(*pair)) as house:
        messages = [{"role": "user", "content": "first"}, {"role": "user", "content": [{"type": "text", "text": "second"}]}]
        body = {"messages": messages, "quality": 1.0}
        answer = httpx2.post(house.url + "/v1/chat/completions", json=body, timeout=30)
        assert answer.headers["x-moe-prism-upstream"] == "large@full" and pair[1].asked[-1] == {
            "messages": messages,
            "model": "l",
        }


def test_options_that_were_late_come_after_those_in_time():
    wanted = RequestLimits(None, 0.0, None, 0.1, 0.01, False)
    pace = AnswerTimes()
    assert pace.beyond(wanted) == 1.0
    pace.note(0.05, None)
    assert pace.beyond(wanted) == 1.0
    pace.note(10.0, 0.02)
    assert pace.beyond(wanted) > 10 and pace.beyond(wanted._replace(ttft=None)) == 2.0


def test_a_target_sends_requests_to_who_met_it_lately(pair, tmp_path):
    with open_pool(tmp_path, two(*pair)) as house:
        for o in (0, 1):
            house.router.options.pace(o).note(2.0, None)
        assert said(post(house)) == ("small", "small@low")
        assert said(post(house, ttft_ms=300)) == ("large", "large@full")
        house.router.options.pace(2).note(9.0, None)
        assert said(post(house, ttft_ms=300)) == ("small", "small@low")  # nobody meets it: the least late

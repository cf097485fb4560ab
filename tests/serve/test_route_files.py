"""What a router reads: pool.yaml, questions, and the record of a measurement."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("fastapi")

from moe_prism.errors import CorruptError, PrismError, UsageError
from moe_prism.pool import choosers
from moe_prism.serve.route.config import PoolBounds, PoolForm, PoolLimitsForm, UpstreamForm, read_pool
from moe_prism.serve.route.record import (
    AnsweredForm,
    PoolRecordForm,
    QuestionForm,
    measure_pool,
    read_questions,
    read_record,
    write_record,
)
from moe_prism.serve.route.run import make_router
from tests.serve.pool_house import LEVELS, listed, nowhere, open_pool, post, two


def test_the_reference_has_every_key():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "pool.md").read_text("utf-8")
    forms = (PoolForm, UpstreamForm, PoolLimitsForm, PoolBounds, PoolRecordForm, AnsweredForm, QuestionForm)
    names = [name for form in forms for name in form.model_fields]
    names += [field.name for made in map(choosers.get, choosers.names()) for field in fields(made.Parameters)]
    assert [name for name in names if f"`{name}`" not in page] == []


GOOD = "upstreams:\n  - {name: small, url: 'http://127.0.0.1:1/v1'}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("upstream: []\n", "pool.yaml:1: a pool has no 'upstream'; did you mean 'upstreams'?"),
        ("name: x\n", "pool.yaml:1: the pool lacks 'upstreams'"),
        (GOOD + "chooser: moe3\n", "pool.yaml:3: no chooser 'moe3'; did you mean 'moe2'?"),
        (
            GOOD + "chooser: moe2\nsettings:\n  rige: 1\n",
            "pool.yaml:5: chooser 'moe2' has no setting 'rige'; did you mean 'ridge'?",
        ),
        (GOOD + "chooser: rocket\nsettings:\n  size: x\n", "pool.yaml:5: size: "),
        (
            "upstreams:\n  - name: a\n    url: http://x/v1\n    costs: 1\n",
            "pool.yaml:4: an upstream has no 'costs'; did you mean 'cost'?",
        ),
        ("upstreams:\n  - name: a\n    url: ftp://host\n", "pool.yaml:3: an upstream url: is no plain http address"),
        ("upstreams:\n  - name: a\n    url: http://key@host/v1\n", "is no plain http address"),
        ("upstreams:\n  - name: a\n    url: http://host:99999\n", "is no plain http address"),
        ("upstreams:\n  - name: a\n    url: 'http://ho st/v1'\n", "is no plain http address"),
        ("upstreams:\n  - name: a@b\n    url: http://x/v1\n", "pool.yaml:2: an upstream name: "),
        ("upstreams: []\n", "pool.yaml:1: upstreams: "),
        (GOOD + "bounds:\n  probe_secnds: 1\n", "pool.yaml:4: bounds has no 'probe_secnds'; did you mean 'probe_seconds'?"),
        (GOOD + "bounds:\n  tries: 0\n", "pool.yaml:4: bounds tries: "),
        (GOOD + "bounds:\n  tries: '3'\n", "pool.yaml:4: bounds tries: "),
        (GOOD + "limits: {energi: 1}\n", "did you mean 'energy'?"),
        (GOOD + "name: small\n", "two things are called 'small'"),
        (GOOD + "name: &a x\nchooser: *a\n", "an alias"),
        ("[1]\n", "pool.yaml:1: a pool is a mapping with 'upstreams'"),
        ("a: [\n", "no YAML"),
    ],
)
def test_what_a_file_must_not_say_is_named_with_its_line(tmp_path, text, words):
    path = tmp_path / "pool.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_pool(path)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_with_defaults_is_read(tmp_path):
    (tmp_path / "pool.yaml").write_text(GOOD)
    pool = read_pool(tmp_path / "pool.yaml")
    assert pool.form.name == "pool" and pool.form.bounds.tries == 3 and pool.record is None
    with pytest.raises(UsageError, match="cannot read"):
        read_pool(tmp_path / "none.yaml")


def answers(knows):
    """An upstream that knows the answers to some kinds of questions."""

    def answer(handler):
        prompt = handler.server.fake.asked[-1]["prompt"]
        handler.say(200, {"choices": [{"text": " yes." if knows in prompt else " no."}]})

    return answer


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{kind} question {i}", "answer": "yes"} for i in range(6) for kind in ("history", "python")]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize(
    "chooser", [pytest.param("moe2", marks=pytest.mark.slow), "symbolic", pytest.param("rocket", marks=pytest.mark.slow)]
)
def test_a_measured_pool_sends_questions_to_who_knows_their_kind(pair, tmp_path, questions, chooser):
    pair[0].answer, pair[1].answer = answers("history"), answers("python")
    upstreams = two(*pair)
    upstreams[0]["levels"] = ["full"]
    with open_pool(tmp_path, upstreams) as house:
        form = measure_pool(house.router.options.pool, read_questions(questions), 4)
    assert form.options == ["small@full", "large@full"] and [q.quality for q in form.questions[:2]] == [[1, 0], [0, 1]]
    assert pair[0].asked[0] == {
        "prompt": "history question 0",
        "max_tokens": 4,
        "temperature": 0,
        "model": "s",
        "quality": "full",
    }
    write_record(tmp_path / "record.json", form)
    with open_pool(tmp_path, upstreams, chooser=chooser, record="record.json") as house:
        assert post(house, prompt="a python question").headers["x-moe-prism-upstream"] == "large@full"
        assert post(house, prompt="a history question").headers["x-moe-prism-upstream"] == "small@full"
        used = httpx2.get(house.url + "/v1/models").json()["data"][0]["options"]
        assert all(each["used"] for each in used)
        pair[0].models = {"data": []}
        house.up("large")
        assert post(house, prompt="a history question").headers["x-moe-prism-upstream"] == "large@full"
        pair[0].models = listed("s", LEVELS)
        house.up("small", "large")
    with open_pool(tmp_path, upstreams, chooser=chooser, record="record.json", limits={"energy": 2.0}) as house:
        assert (
            post(house, prompt="a python question").headers["x-moe-prism-upstream"] == "small@full"
        )  # the other one is beyond the limit


def test_records_and_questions_that_are_none_are_refused(tmp_path, questions):
    pool = tmp_path / "pool.yaml"
    record = {"options": ["small@full"], "questions": [{"text": "x", "quality": [1.0], "seconds": [0.1]}]}
    pool.write_text(GOOD + "chooser: moe2\n")
    with pytest.raises(UsageError, match="needs a record"):
        make_router(read_pool(pool))
    pool.write_text(GOOD + "chooser: moe2\nrecord: record.json\n")
    with pytest.raises(UsageError, match="cannot read"):
        make_router(read_pool(pool))
    for change, error in (
        ({"options": ["other@full"]}, UsageError),
        ({"options": ["small@full", "small@full"]}, CorruptError),
        ({"questions": []}, CorruptError),
        ({"questions": [{"text": "x", "quality": [2.0], "seconds": [0.1]}]}, CorruptError),
        ({"questions": [{"text": "x", "quality": [1.0, 1.0], "seconds": [0.1]}]}, CorruptError),
        ({"more": 1}, CorruptError),
    ):
        (tmp_path / "record.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(error):
            make_router(read_pool(pool))
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert make_router(read_pool(pool)).options.names == ["small@full"] and read_record(tmp_path / "record.json")
    for text, words in (
        ("{}\n", "q.jsonl:1: "),
        ('{"prompt": "x", "answer": ""}\n', "q.jsonl:1: answer"),
        ("\n", "0 questions"),
        ("x", ":1:"),
    ):
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(UsageError, match=words):
            read_questions(tmp_path / "q.jsonl")


def test_an_upstream_that_does_not_answer_ends_a_measurement(pair, tmp_path, questions):
    pair[1].answer = lambda h: h.say(500, {"error": {}})
    (tmp_path / "pool.yaml").write_text(json.dumps({"upstreams": two(*pair)}))
    with pytest.raises(PrismError, match="'large@full' did not answer: status 500"):
        measure_pool(read_pool(tmp_path / "pool.yaml"), read_questions(questions), 4)
    (tmp_path / "pool.yaml").write_text(json.dumps({"upstreams": [{"name": "dead", "url": nowhere()}]}))
    with pytest.raises(PrismError, match="'dead' does not answer"):
        measure_pool(read_pool(tmp_path / "pool.yaml"), read_questions(questions), 4)

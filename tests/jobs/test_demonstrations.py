"""Calibration on tasks with the model's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_prism.checkpoint import read_manifest
from moe_prism.data.tasks import read_tasks
from moe_prism.errors import UsageError
from moe_prism.jobs import demonstrations
from moe_prism.jobs.calibrate import calibrate_model, read_statistics
from moe_prism.jobs.demonstrations import ANSWERS, answer, prompt_ids
from moe_prism.model import load_to_run, load_tokenizer
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.text import TextSource

QUESTIONS = [
    "def sort(rows):",
    "class Reader:\n",
    "import json\n\nwith open",
    "for name in names:",
    "x = [i for i in",
    "try:\n    ",
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    rows = [{"prompt": q, "completion": "never used"} for q in [*QUESTIONS, *QUESTIONS[:1]]]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def options(*tasks, **more):
    given = {"answer_tokens": 12, "length": 32, "collectors": ["counts", "outputs"], "tokens": 4096} | more
    return CalibrateOptions(tasks=[str(task) for task in tasks], **given)


def answers(folder):
    return [json.loads(line) for line in (Path(folder) / ANSWERS).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(tiny_source, tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "calibration"
    calibrate_model(tiny_source, out, options(tasks))
    return out


def test_answers_are_the_models_own_and_kept_beside_the_statistics(tiny_source, done):
    rows, model, tokenizer = answers(done), load_to_run(tiny_source), load_tokenizer(tiny_source)
    assert sorted(row["prompt"] for row in rows) == sorted(QUESTIONS)  # a task that is given twice is answered once
    for row in rows:
        ids = torch.tensor([prompt_ids(tokenizer, row["prompt"])])
        for token in row["answer_ids"]:  # greedy, one token at a time, alone and without padding
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert row["answer"] == tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
        assert row["ended"] == "stop" or len(row["answer_ids"]) == 12
    statistics = read_statistics(done)
    seen = sum(row["prompt_tokens"] + len(row["answer_ids"]) for row in rows)
    assert seen - 32 < statistics.facts["tokens"] <= seen
    assert statistics.facts["tasks"]["answered"] == 6
    assert not list(done.glob("answers-*")) and ANSWERS in read_manifest(done)["files"]


def test_an_interrupted_run_asks_only_what_has_no_answer(tiny_source, tasks, done, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstrations, "BATCH", 2)
    calls = []

    def counted(model, tokenizer, prompts, given, stop_after=2):
        calls.append(len(prompts))
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        return answer(model, tokenizer, prompts, given)

    monkeypatch.setattr(demonstrations, "answer", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(tiny_source, out, options(tasks))
    assert not out.exists()
    monkeypatch.setattr(demonstrations, "answer", lambda *given: counted(*given, stop_after=0))
    calibrate_model(tiny_source, out, options(tasks), resume=True)
    assert calls == [2, 2, 2, 2]  # the second batch twice
    assert [row["answer_ids"] for row in answers(out)] == [row["answer_ids"] for row in answers(done)]


def test_drawn_answers_follow_the_seed(tiny_source, tasks, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate_model(tiny_source, tmp_path / name, options(tasks, temperature=1.0, seed=seed))
    a, b, c = ([row["answer_ids"] for row in answers(tmp_path / name)] for name in "abc")
    assert a == b != c


def test_tasks_of_domains_and_a_file_of_lines(tiny_source, tasks, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a question\n\nanother question\n")
    statistics = calibrate_model(tiny_source, tmp_path / "out", options(f"code={tasks}", f"prose={lines}", tokens=120))
    assert statistics.facts["domains"].keys() == {"code", "prose"} == statistics.layers[0].domains.keys()
    rows = answers(tmp_path / "out")
    assert {row["task"] for row in rows if row["domain"] == "prose"} == {"lines.txt:1", "lines.txt:3"}
    assert statistics.facts["tasks"]["left_out"] == {"tasks beyond --tokens": 6 - sum(r["domain"] == "code" for r in rows)}
    assert statistics.facts["tasks"]["left_out"]["tasks beyond --tokens"] > 0


def test_conversations_are_asked_up_to_the_last_answer(tiny_source, tmp_path):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    rows = [{"messages": [{"role": role, "content": said} for role, said in turns[:n]]} for n in (4, 1)]
    rows += [{"messages": [{"role": "assistant", "content": "no question"}]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found, read = read_tasks(load_tokenizer(tiny_source), TextSource.of(str(tmp_path / "chats.jsonl")))
    assert {task.prompt for task in found[""]} == {"one\n\ntwo\n\nthree", "one"}
    assert read[0]["left_out"] == {"rows without a question": 1}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"low_memory": True}, "for every token"),
        ({"text": "topics"}, "instead of --text"),
        ({"answer_tokens": 10**6}, "fit into the model's context"),
    ],
)
def test_what_cannot_be_meant_together(tiny_source, tasks, tmp_path, more, says):
    with pytest.raises(UsageError, match=says):
        calibrate_model(tiny_source, tmp_path / "out", options(tasks, **more))
    assert not (tmp_path / "out").exists()


def test_files_without_tasks_are_named(tiny_source, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no tasks"):
        calibrate_model(tiny_source, tmp_path / "out", options(tmp_path / "empty.txt"))
    with pytest.raises(UsageError, match="is not NAME=PATH"):
        options("a.jsonl", "b.jsonl").check()

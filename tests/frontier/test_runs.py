"""Runs side by side, and tasks beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_prism import cli
from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier import Frontier
from moe_prism.frontier.evaluation import Evaluated, Evaluation, Score, score_rows
from moe_prism.frontier.record import MeasuredPoint
from moe_prism.frontier.runs import doubts, read_runs
from moe_prism.jobs.evaluate import read_scores
from moe_prism.point import FULL

SCORE = Score("arc", "acc", 0.62, 0.05, True, 100)


def frontier(model, text="stdlib"):
    def point(name, share, kl):
        return MeasuredPoint(
            name,
            "threshold",
            share,
            8 * share,
            3.0,
            kl,
            1 - kl,
            10 * share,
            40 * share,
            80 * share,
            True,
            point=FULL.with_budget(share),
        )

    points = (point("full", 1.0, 0.0), point("half", 0.5, 0.02), point("low", 0.25, 0.2))
    return Frontier(model, "source", 4, points, provenance={"evaluation": {"text": text, "tokens": 64}})


@pytest.fixture
def two(tmp_path):
    for name, text in (("a", "stdlib"), ("b", "domains")):
        (tmp_path / name).mkdir()
        frontier(f"model-{name}", text).save(tmp_path / name / "frontier.json")
    tasks = Evaluation("model-a", (Evaluated("full", FULL, (SCORE,)),), {"options": {}})
    (tmp_path / "a/eval.json").write_bytes(tasks.encoded())
    assert Evaluation.load(tmp_path / "a/eval.json") == tasks
    return [tmp_path / "a", tmp_path / "b/frontier.json"]


def test_the_closest_point_within_a_share(two):
    a, b = read_runs(two)
    assert [run.name for run in (a, b)] == ["a", "b"] and a.evaluation and b.evaluation is None
    assert [a.within(share * a.full_bytes).name for share in (1, 0.75, 0.5, 0.25)] == ["full", "half", "half", "low"]
    assert a.within(1) is None and "different text" in doubts([a, b])[0] and not doubts([a])
    assert [run.name for run in read_runs([two[0], two[0]])] == ["1:a", "2:a"]
    assert "sources differ" in doubts([a, replace(a, frontier=replace(a.frontier, source="other"))])[0]


def test_the_command_prints_and_writes(two, tmp_path, capsys):
    assert cli.main(["report", *map(str, two), "-o", str(tmp_path / "runs.html")]) == 0
    out, err = capsys.readouterr()
    assert "0.0200 (half)" in out and "0.6200 ± 0.0500" in out and "different text" in err
    page = (tmp_path / "runs.html").read_text()
    assert (
        "0.6200 ± 0.0500" in page
        and "different text" in page
        and page.count("<svg") == 2
        and "http" not in page.replace("http://www.w3.org", "")
    )
    assert cli.main(["report", *map(str, two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["at_share"]["0.5"]["name"] == "half"


def test_what_is_no_run_is_refused(two, tmp_path):
    with pytest.raises(UsageError, match="there is no"):
        read_runs([tmp_path])
    (two[0] / "eval.json").write_text('{"kind": "evaluation"}')
    with pytest.raises(CorruptError):
        read_runs(two)


def test_scores_are_what_lm_eval_says():
    found = {
        "results": {
            "arc": {"alias": "arc", "acc,none": 0.62, "acc_stderr,none": 0.05, "exact,strict": 0.5, "exact_stderr,strict": "N/A"}
        },
        "higher_is_better": {"arc": {"acc": True, "exact": True}},
        "n-samples": {"arc": {"original": 200, "effective": 100}},
    }
    first, second = read_scores(found)
    assert first == SCORE and (second.metric, second.stderr) == ("exact,strict", None)
    rows = score_rows((SimpleNamespace(name="full", scores=(first,)), SimpleNamespace(name="half", scores=(second,))))
    assert rows == [("arc", "acc", "0.6200 ± 0.0500", "-"), ("arc", "exact,strict", "-", "0.5000")]

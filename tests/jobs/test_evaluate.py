"""eval: lm-eval's tasks at operating points, here with a stand-in for the library; what the real one gives is in the how-to page."""

from __future__ import annotations

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest

from moe_prism import cli
from moe_prism.checkpoint import read_manifest
from moe_prism.elastic.runtime import elastic_of
from moe_prism.frontier.evaluation import Evaluation

TASKS = ("arc_easy", "hellaswag")


class Manager:
    all_tasks = TASKS

    def __init__(self, include_path=None):
        self.include_path = include_path

    def match_tasks(self, names):
        return [name for name in names if name in TASKS]


@pytest.fixture
def library(monkeypatch):
    """A library that scores a point by its budget, and notes what it was asked."""
    asked = []

    def simple_evaluate(*, model, tasks, **how):
        elastic = elastic_of(model.pretrained)
        budget = elastic.step.bound.points[0].slots.budget
        asked.append((tuple(tasks), budget, how))
        results = {task: {"alias": task, "acc,none": 0.5 + budget / 4, "acc_stderr,none": 0.01} for task in tasks}
        return {"results": results, "higher_is_better": {}, "n-samples": {task: {"effective": 10} for task in tasks}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = Manager
    modules["lm_eval.models.huggingface"].HFLM = lambda **given: SimpleNamespace(**given)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("moe_prism.jobs.evaluate._version", lambda: "0")
    return asked


@pytest.fixture
def run(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = cli.main(["eval", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


def test_every_point_runs_every_task(library, run, elastic_tiny, tmp_path):
    folder = shutil.copytree(elastic_tiny, tmp_path / "elastic")
    code, out, err = run(
        folder, "--tasks", "arc_easy,hellaswag", "--points", "full,0.5", "--limit", 10, "--num-fewshot", 2, "--seed", 7
    )
    assert code == 0, err
    assert [(tasks, budget) for tasks, budget, _ in library] == [(TASKS, 1.0), (TASKS, 0.5)]
    assert library[0][2]["limit"] == 10 and library[0][2]["num_fewshot"] == 2 and library[0][2]["fewshot_random_seed"] == 7
    assert "0.7500 ± 0.0100" in out and "0.6250 ± 0.0100" in out and "budget-0.5" in out
    result = Evaluation.load(folder / "eval.json")
    assert [p.name for p in result.points] == ["full", "budget-0.5"] and result.points[1].scores[0].questions == 10
    assert "eval.json" in read_manifest(folder)["files"] and cli.main(["verify", str(folder)]) == 0
    assert json.loads(run(folder, "--tasks", "arc_easy", "--json")[1])["points"][0]["name"] == "full"


def test_any_checkpoint_is_evaluated_with_a_folder_for_the_result(library, run, tiny_source, tmp_path):
    code, _, err = run(tiny_source, "--tasks", "arc_easy")
    assert code == 2 and "--out" in err
    assert run(tiny_source, "--tasks", "arc_easy", "-o", tmp_path / "out")[0] == 0 and (tmp_path / "out/eval.json").is_file()


def test_mistakes_are_told_before_the_model_is_loaded(library, run, elastic_tiny, monkeypatch):
    monkeypatch.setattr("moe_prism.jobs.evaluate.open_model", None)
    for given, said in (
        ((), "--tasks names none"),
        (("--tasks", "arc_esay"), "did you mean 'arc_easy'?"),
        (("--tasks", "arc_easy", "--points", "1.5"), "outside (0, 1]"),
        (("--tasks", "arc_easy", "--points", "full,full"), "names one twice"),
        (("--tasks", "arc_easy", "--points", "nonsense"), "'nonsense'"),
        (("--tasks", "arc_easy", "--include-path", "missing"), "is no folder"),
    ):
        code, _, err = run(elastic_tiny, *given)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_without_the_library_the_extra_is_named(run, elastic_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = run(elastic_tiny, "--tasks", "arc_easy")
    assert code == 2 and "pip install 'moe-prism[eval]'" in err and err.count("\n") == 1

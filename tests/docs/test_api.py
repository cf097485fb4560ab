"""The public Python API: a function for every command, and a docstring with an example that runs for every name.

Examples run in a folder of their own, where `elastic` is a refactored model and `quantized` a copy of its weights. They run one after
the other in one process, and those that take long or start servers in processes of their own, as slow tests.
"""

from __future__ import annotations

import doctest
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import moe_prism
from moe_prism.cli import build
from moe_prism.result import Findings

from .pages import ROOT

NAMES = sorted(set(moe_prism.__all__) - {"__version__"})
COMMANDS = {
    "demo": "run_demo",
    "doctor": "check_machine",
    "inspect": "inspect_model",
    "calibrate": "calibrate_model",
    "refactor": "refactor",
    "adopt": "adopt",
    "prune": "prune_model",
    "compress": "compress_model",
    "split": "split_model",
    "train": "train",
    "patterns": "write_patterns",
    "adapter": "make_adapter",
    "recover": "recover_model",
    "skip": "make_skip_plan",
    "frontier": "measure_frontier",
    "eval": "evaluate_model",
    "report": "compare_runs",
    "run": "run_recipe",
    "recipe": "run_recipe",
    "forecast": "forecast_speed",
    "generate": "generate",
    "serve": "serve_model",
    "route": "route_pool",
    "bench": "bench_server",
    "trace": "record_trace",
    "offload": "forecast_offload",
    "place": "place_experts",
    "verify": "verify",
    "ls": "list_choices",
}
HEAVY = {
    "adopt",
    "bench_policies",
    "bench_server",
    "calibrate_model",
    "calibrate_part",
    "check_machine",
    "compare_runs",
    "compress_model",
    "forecast_offload",
    "keep_frontier",
    "make_skip_plan",
    "measure_compression",
    "measure_frontier",
    "record_trace",
    "recover_model",
    "refactor",
    "rehearse",
    "route_pool",
    "run_demo",
    "run_recipe",
    "serve_model",
    "time_frontier",
    "write_frontier",
    "write_patterns",
}
"""What reads the standard library as text, measures, or starts servers."""
QUIET = {"jobs/time_points.py", "data/render_chat.py", "serve/logs.py"}
"""Who may write to the standard streams beside the command line: processes of their own, and a server's log."""


def example(name):
    """The doctest of a public name, of itself and not of its methods."""
    thing = getattr(moe_prism, name)
    return doctest.DocTestParser().get_doctest(inspect.getdoc(thing), {}, name, None, None)


def run_examples(names):
    """Run the examples of names in this folder; AssertionError with what they said instead."""
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in names:
        runner.run(example(name), out=said.append)
    assert not runner.failures, "".join(said)


@pytest.fixture
def folder(elastic_nano, tmp_path, monkeypatch):
    shutil.copytree(elastic_nano, tmp_path / "elastic")
    weights = ("config.json", "*.safetensors", "*.index.json", "tokenizer*")
    (tmp_path / "quantized").mkdir()
    for pattern in weights:
        for file in elastic_nano.glob(pattern):
            if file.name != "prism.safetensors":
                shutil.copyfile(file, tmp_path / "quantized" / file.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_has_a_function():
    commands = {name for name in build() if not name.startswith("-")} - {"plan"}  # a hidden name of forecast
    assert commands == set(COMMANDS) and set(COMMANDS.values()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example(name):
    thing = getattr(moe_prism, name)
    assert len(inspect.getdoc(thing).splitlines()[0]) > 20
    assert any(name in line.source + (line.exc_msg or "") for line in example(name).examples), (
        f"{name} has no example that uses it"
    )
    assert any(line.want for line in example(name).examples) or name in HEAVY


@pytest.mark.slow
def test_quick_examples_run(folder, capsys):
    run_examples(name for name in NAMES if name not in HEAVY)
    written = capsys.readouterr()
    assert not written.out and not written.err, "a function printed"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(HEAVY))
def test_heavy_example_runs(name, folder):
    code = f"from tests.docs.test_api import run_examples; run_examples([{name!r}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and not done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_options_are_what_functions_take():
    """Every class of options is exported for a function that takes it, so that nobody needs to know where it lives."""
    things = [getattr(moe_prism, name) for name in NAMES]
    taken = " ".join(str(inspect.signature(thing)) for thing in things if inspect.isfunction(thing))
    assert all(name in taken for name in NAMES if name.endswith("Options"))


def test_results_become_json_frames_and_tables():
    facts = moe_prism.inspect_model("nano")
    json.dumps(facts.to_json())
    frame = facts.to_frame()
    assert list(frame["experts"]) == [32] * 6 and len(frame) == len(facts.to_records())
    table = Findings({"rows": [{"name": "<script>", "kl": 0.123456789, "none": None}]}, "rows")._repr_html_()
    assert "&lt;script&gt;" in table and "<td>0.123457</td>" in table and "<td></td>" in table
    long = Findings({"rows": [{"n": n} for n in range(100)]}, "rows")
    assert long._repr_html_().count("<tr>") == 61 and "40 more" in long._repr_html_()


def test_a_frame_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(moe_prism.UsageError, match="notebook"):
        moe_prism.inspect_model("nano").to_frame()


def test_nothing_but_the_command_line_writes_to_the_standard_streams():
    source, found = ROOT / "src" / "moe_prism", re.compile(r"^(?!.*(>>>|\.\.\. )).*(\bprint\(|\bsys\.std(out|err)\b)", re.M)
    for path in sorted(source.rglob("*.py")):
        place = str(path.relative_to(source))
        if not place.startswith("cli/") and place not in QUIET:
            assert not found.search(path.read_text("utf-8")), f"{place} writes to a standard stream"

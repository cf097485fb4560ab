"""The command: one JSON object on stdout, help without torch, exit codes, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_prism import cli, load
from moe_prism.catalogue import REGISTRIES
from moe_prism.checkpoint import sha256_file
from moe_prism.errors import CorruptError
from moe_prism.jobs import resources
from moe_prism.options.serve import ServeOptions
from moe_prism.serve.config import Config
from moe_prism.serve.engine.start import start_engine
from tests.tiny_sources import digests

COMMANDS = (
    "demo",
    "doctor",
    "inspect",
    "calibrate",
    "refactor",
    "adopt",
    "prune",
    "compress",
    "split",
    "train",
    "patterns",
    "recover",
    "adapter",
    "skip",
    "frontier",
    "eval",
    "report",
    "forecast",
    "generate",
    "serve",
    "route",
    "bench",
    "trace",
    "offload",
    "place",
    "verify",
    "run",
    "recipe",
    "ls",
)
KINDS = ("families", *REGISTRIES)
COMMAND = (sys.executable, "-c", "from moe_prism.cli import entry; entry()")  # what the installed script does
SMALL = ("--tokens", "256", "--length", "32")


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def run_json(run):
    """run_json(*arguments) -> the one JSON object on stdout of a command that succeeds."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.endswith("}\n") and out.count("\n") == 1
        return json.loads(out)

    return call


def test_help_describes_every_parameter():
    app = cli.build()
    for name in COMMANDS:
        for argument in app[name].assemble_argument_collection(parse_docstring=True):
            assert argument.children or argument.parameter.help, (name, argument.name)
            assert "\n" not in (argument.parameter.help or ""), f"{name} {argument.name}: a line break of the source in the help"


def test_help_lists_the_commands_as_they_are_used(run):
    out = run("--help")[1]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2].islower()] == list(COMMANDS)


@pytest.mark.parametrize(("command", "next_step"), [("refactor", "go on with --resume"), ("inspect", "run it again")])
def test_an_interruption_names_what_helps(run, tiny_source, tmp_path, monkeypatch, command, next_step):
    def interrupted(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_prism.jobs.refactor.refactor", interrupted)
    monkeypatch.setattr("moe_prism.jobs.inspect.inspect_model", interrupted)
    code, _, err = run(command, tiny_source, *(("-o", tmp_path / "out") if command == "refactor" else ()))
    assert code == cli.INTERRUPTED and next_step in err and err.count("\n") == 1


def test_the_command_ends_with_the_exit_code():
    done = subprocess.run([*COMMAND, "refactor"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("moe-prism: error: ") and done.stderr.count("\n") == 1


def test_version(run):
    from moe_prism import __version__

    assert run("--version")[:2] == (0, f"{__version__}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_ls(run_json, run, kind):
    found = run_json("ls", kind)
    assert found["kind"] == kind and found["entries"]
    shown = run("ls", kind)[1]
    assert all(entry["name"] in shown for entry in found["entries"])


def test_doctor(run_json):
    found = run_json("doctor")
    assert found["machine"]["cores"] and found["libraries"]["torch"] and found["checks"][0]["ok"]


def test_inspect(run_json, tiny_source, tiny_dense):
    found = run_json("inspect", tiny_source)
    assert found["family"] == "olmoe" and found["experts_per_token"] == 2
    assert [(r["kind"], r["experts"], r["width"]) for r in found["layers"]] == [("moe", 4, 16)] * 2
    assert found["sub_experts"] == [2, 4, 8, 16]
    assert {r["kind"] for r in run_json("inspect", tiny_dense)["layers"]} == {"dense"}


def test_inspect_says_what_is_elastic_already(run_json, run, tiny_source, elastic_tiny):
    assert run_json("inspect", tiny_source)["n_sub"] is None and run_json("inspect", elastic_tiny)["n_sub"] == 4
    _, shown, _ = run("inspect", elastic_tiny)
    assert f"elastic already, 4 sub-experts each; next: `moe-prism frontier {elastic_tiny}`" in shown and "--n-sub" not in shown


@pytest.mark.parametrize("json_wanted", [True, False])
@pytest.mark.parametrize("command", ["frontier", "skip"])
def test_f04_a_disk_that_fills_during_the_work_does_not_cost_the_result(
    run, elastic_tiny, text_file, tmp_path, monkeypatch, command, json_wanted
):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("moe_prism.checkpoint.change.replace_file", "moe_prism.frontier.record.replace_file"):
        monkeypatch.setattr(place, full)
    options = ("--mean", "1", "--method", "uniform") if command == "skip" else ("--compare", "product", "--per-method", "2")
    code, out, err = run(
        command, elastic_tiny, "-o", tmp_path / "out", *options, "--text", text_file, *SMALL, *["--json"] * json_wanted
    )
    errors = [line for line in err.splitlines() if line.startswith("moe-prism: error: ")]
    assert code == 1 and len(errors) == 1 and "No space left on device" in errors[0] and "Traceback" not in err
    if json_wanted:
        found = json.loads(out)  # one object
        assert found["points"] if command == "frontier" else found["point"]["routing"][0]["layers"]
    else:
        assert ("resident MB" if command == "frontier" else "perplexity") in out


def test_the_whole_path(run_json, run, tiny_source, text_file, tmp_path):
    """calibrate -> refactor --dry-run -> refactor -> verify -> frontier -> verify -> generate."""
    text = ("--text", text_file)
    calibration, out = tmp_path / "calibration", tmp_path / "elastic"
    found = run_json("calibrate", tiny_source, "-o", calibration, *text, *SMALL)
    assert found["tokens"] == 256 and found["layers"] == 2 and found["reservoir"] == 2048
    assert {c["name"] for c in run_json("verify", calibration)["checks"]} >= {"manifest", "files"}

    planned = run_json("refactor", tiny_source, "-o", out, *text, *SMALL, "--dry-run")
    assert planned["peak_memory_bytes"] > planned["weights_bytes"] > 0 and not out.exists()
    assert planned["disk_bytes"] > planned["statistics_bytes"]  # their snapshot lies beside the new checkpoint until it is whole
    made = run_json("refactor", tiny_source, "-o", out, "--calibration", calibration)
    assert (made["folder"], made["n_sub"], made["layers"]) == (str(out), 4, 2) and made["peak_rss_bytes"] > 0
    assert run_json("verify", out)["checks"][-1]["name"] == "side tensors"

    measured = run_json("frontier", out, *text, *SMALL, "--compare", "product,whole-experts")
    assert {p["rule"] for p in measured["points"]} == {"product", "whole-experts"}
    assert json.loads((out / "frontier.json").read_text()) == measured
    assert (out / "report.html").stat().st_size and (out / "frontier.png").stat().st_size
    assert run_json("verify", out)  # the report and the points are part of the folder now
    assert json.loads((out / "prism.json").read_text())["operating_points"]

    made = run_json("generate", out, "--prompt", "import", "--budget", "0.5", "--max-tokens", "4")
    assert made["prompt"] == "import" and 1 <= made["tokens"] <= 4 and made["tokens_per_s"] > 0
    code, shown, _ = run("generate", out, "--prompt", "import", "--budget", "0.5", "--max-tokens", "4")
    assert (code, shown) == (0, ("import" + made["text"]).rstrip() + "\n")


@pytest.mark.slow
def test_times_are_written_and_a_failed_timing_costs_only_them(run_json, run, elastic_tiny, text_file, tmp_path, monkeypatch):
    import moe_prism.jobs.time_points as job
    from moe_prism.cli.frontier import show
    from moe_prism.errors import PrismError
    from moe_prism.frontier import Frontier

    options = (elastic_tiny, "-o", tmp_path, "--text", text_file, *SMALL, "--compare", "threshold", "--per-method", "2", "--time")

    def breaks(order, update):
        raise PrismError("the process that times points died", "leave --time out")

    monkeypatch.setattr(job, "_ask", breaks)
    code, _, err = run("frontier", *options)
    assert (
        code == 1
        and "times points died" in err
        and "time" not in json.loads((tmp_path / "frontier.json").read_text())["points"][0]
    )
    monkeypatch.setattr(job, "_ask", job._run)
    monkeypatch.setattr(job, "PROMPT", 8)
    monkeypatch.setattr(job, "MOST_TURNS", job.LEAST_TURNS)
    found = run_json("frontier", *options, "--time-batch", "2")
    assert all(p["time"]["batch"] == 2 for p in [*found["points"], *found["baseline_topk"]])
    assert json.loads((tmp_path / "frontier.json").read_text()) == found
    assert "ms/token" in show(Frontier.from_json(found))


def test_a_plan_is_made_measured_and_used(run_json, run, tiny_source, elastic_tiny, text_file, tmp_path):
    """skip -> generate --point -> frontier --points --methods, on a plain checkpoint and on an elastic folder."""
    text, plan = ("--text", text_file), tmp_path / "plan.json"
    for source in (tiny_source, elastic_tiny):
        found = run_json("skip", source, "--mean", "1.5", "-o", plan, *text, *SMALL)
        assert sum(found["point"]["routing"][0]["layers"]) == 3 and found["made"]["quality"]["kl"] > 0
        assert {k: v for k, v in found.items() if k != "file"} == json.loads(plan.read_text())
        prompt = ("generate", source, "--prompt", "import", "--max-tokens", "4")
        made = run_json(*prompt, "--point", plan)
        assert 1 <= made["tokens"] <= 4 and made["point"] == found["point"]
        assert run_json(*prompt, "--plan", plan)["text"] == made["text"]  # its name in version 0.1
        out = tmp_path / source.name
        measured = run_json("frontier", source, "-o", out, *text, *SMALL, "--points", plan, "--methods", "uniform")
        assert {p["rule"] for p in measured["points"]} == {"uniform", "given point"}
        assert (out / "report.html").stat().st_size
    code, _, err = run("frontier", tiny_source, *text, *SMALL, "--methods", "uniform")
    assert code == 2 and "--out" in err
    assert run("skip", tiny_source, "--method", "product", "-o", plan)[0] == 2


def test_a_measured_point_runs_again_by_name_and_by_file(run_json, run, elastic_tiny, text_file, tmp_path):
    """frontier -> generate --point NAME, --point FILE, with and without a store -> frontier --points FILE: the same KL."""
    folder, text = tmp_path / "elastic", ("--text", text_file)
    shutil.copytree(elastic_tiny, folder)
    asked = ("--methods", "product,uniform", "--per-method", "2")
    first = run_json("frontier", folder, *text, *SMALL, "--calibration-tokens", "256", *asked)
    again = run_json("frontier", folder, "-o", tmp_path / "again", *text, *SMALL, "--points", folder / "frontier.json")
    known = {p["name"]: p for p in [*again["points"], *again["baseline_topk"]]}
    for p in [*first["points"], *first["baseline_topk"]]:
        if p["budget"] < 1:
            assert known[p["name"]]["point"] == p["point"] and known[p["name"]]["kl"] == pytest.approx(p["kl"], abs=1e-9)

    prompt = ("generate", folder, "--prompt", "import", "--max-tokens", "6")
    for p in {p["rule"]: p for p in first["points"]}.values():
        made = run_json(*prompt, "--point", p["name"])
        assert made["point"] == p["point"]
        (tmp_path / "one.json").write_text(json.dumps(p["point"]))
        assert run_json(*prompt, "--point", tmp_path / "one.json")["text"] == made["text"]
        assert run_json(*prompt, "--point", p["name"], "--expert-memory", "1MB")["text"] == made["text"]
    nearest = first["points"][0]["name"]
    code, _, err = run(*prompt, "--point", f"{nearest}x")
    assert code == 2 and f"did you mean '{nearest}'?" in err


def test_progress_goes_to_stderr(run, tiny_source, text_file, tmp_path):
    code, out, err = run("calibrate", tiny_source, "-o", tmp_path / "c", "--text", text_file, *SMALL)
    assert code == 0 and "calibrate: 8/8" in err and "calibrate:" not in out


def test_force_and_resume(run, tiny_source, text_file, tmp_path):
    arguments = ("refactor", tiny_source, "-o", tmp_path / "out", "--text", text_file, *SMALL)
    assert run(*arguments)[0] == 0
    first = digests(tmp_path / "out")
    assert run(*arguments, "--resume")[0] == 0  # nothing is left to do
    assert run(*arguments, "--force")[0] == 0
    assert digests(tmp_path / "out") == first
    assert run(*arguments, "--resume", "--n-sub", "2")[0] == 2  # another result than the one that is there


def test_f11_a_machine_that_is_too_small_gives_3_and_one_object(run, tiny_source, tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 1)
    monkeypatch.setattr(resources, "resident_memory", lambda: 0)
    code, out, err = run("refactor", tiny_source, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 3 and json.loads(out)["exit_code"] == 3 and "--low-memory" in err
    code, out, _ = run("refactor", tiny_source, "-o", tmp_path / "out", "--dry-run")
    assert code == 3 and "peak_memory_bytes" in out
    for command in ("refactor", "calibrate"):  # F04: a real run asks the same before it starts
        code, _, err = run(command, tiny_source, "-o", tmp_path / "out")
        assert code == 3 and "of memory" in err and not list(tmp_path.iterdir())


def test_f07_verify_finds_a_flipped_bit(run, elastic_tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(elastic_tiny, folder)
    shard = sorted(folder.glob("model*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    code, out, err = run("verify", folder, "--json")
    assert code == 4 and shard.name in err and json.loads(out)["exit_code"] == 4
    assert sha256_file(elastic_tiny / shard.name) != sha256_file(shard)
    # F07: at load too, where it is asked for
    code, out, err = run("generate", folder, "--prompt", "x", "--max-tokens", "1", "--verify")
    assert code == 4 and shard.name in err and err.count("\n") == 1 and not out
    with pytest.raises(CorruptError, match=shard.name):
        start_engine(folder, ServeOptions(verify=True), Config())


def test_f07_loading_with_verify_looks_at_files_that_are_not_read_too(elastic_tiny, tmp_path):
    folder = Path(shutil.copytree(elastic_tiny, tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": {"total_size": 1}}))  # as good as it was
    load(folder)
    with pytest.raises(CorruptError, match=index.name):
        load(folder, verify=True)
    shutil.copyfile(elastic_tiny / index.name, index)
    (folder / "model-00099-of-00099.bin").write_bytes(b"")
    with pytest.raises(CorruptError, match="00099"):
        load(folder, verify=True)


@pytest.mark.slow
def test_demo(tmp_path):
    done = subprocess.run(
        [*COMMAND, "demo", "--out", str(tmp_path / "demo"), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [s["budget"] for s in found["samples"]] == [1.0, 0.5, 0.25]
    assert {"elastic-nano", "frontier.json", "report.html", "frontier.png"} <= {p.name for p in (tmp_path / "demo").iterdir()}

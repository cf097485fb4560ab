"""A rehearsal checks what the run checks, says what it needs, and leaves no trace."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import moe_prism
from moe_prism.artefact.source import Weights
from moe_prism.errors import DoesNotFit, UsageError
from moe_prism.forecast.work_time import Seconds
from moe_prism.jobs import job_times, pilot, resources
from moe_prism.jobs.calibrate import calibration_windows
from moe_prism.jobs.rehearsal import begin, on_machine, rehearse
from moe_prism.options.machine import OtherMachine
from tests.tiers import by_night
from tests.tiny_sources import save_tiny

SMALL = ("--tokens", "256", "--length", "32")
COMMANDS = {
    "refactor": ("refactor", "{source}", "-o", "out", "--text", "{text}", *SMALL),
    "calibrate": ("calibrate", "{source}", "-o", "out", "--text", "{text}", *SMALL),
    "prune": ("prune", "{source}", "-o", "out", "--keep", "0.5", "--text", "{text}", *SMALL),
    "adopt": ("adopt", "{elastic}", "--from", "{elastic}", "-o", "out", "--text", "{text}", "--tokens", "512"),
    "recover": ("recover", "{elastic}", "-o", "out", "--text", "{text}", "--tokens", "512", "--length", "32"),
    "skip": ("skip", "{source}", "--mean", "1", "--text", "{text}", *SMALL),
    "frontier": ("frontier", "{elastic}", "-o", "out", "--text", "{text}", *SMALL, "--calibration-tokens", "256"),
    "trace": ("trace", "{source}", "-o", "out.npz", "--text", "{text}", *SMALL, "--prompt", "8"),
}
UNTIMED = ("adopt", "skip", "trace")
"""Commands of whose work no batch is tried before."""


@pytest.fixture
def ask(capsys, tiny_source, elastic_tiny, text_file, tmp_path, monkeypatch):
    """ask(command, *changes): exit code, stdout and stderr of its dry run in an empty folder."""
    from moe_prism import cli

    monkeypatch.chdir(tmp_path)

    def run(name, *more, text=text_file):
        places = {"source": tiny_source, "elastic": elastic_tiny, "text": text}
        code = cli.main([*(word.format(**places) for word in COMMANDS[name]), "--dry-run", *more])
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_long_command_can_be_rehearsed(name, ask, tmp_path):
    code, out, err = ask(name, "--json")
    assert code == 0, err
    needed = json.loads(out)
    parts = [v for k, v in needed.items() if k.endswith("_bytes") and k not in ("peak_memory_bytes", "disk_bytes")]
    assert needed["peak_memory_bytes"] == sum(parts) > 2**20 and not list(tmp_path.iterdir())
    assert (needed["seconds"] is None) == (name in UNTIMED) and (needed["seconds"] or 1) > 0


@pytest.mark.parametrize("name", ["refactor", "calibrate"])
def test_the_time_of_a_layer_at_a_time_is_told_where_a_layer_fits(name, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "times"))
    with monkeypatch.context() as small:
        small.setattr(pilot, "available_memory", lambda: 0)
        code, out, _ = ask(name, "--json", "--low-memory")
        assert code == 0 and json.loads(out)["seconds"] is None, "nothing is loaded that does not fit"
    assert json.loads(ask(name, "--json", "--low-memory")[1])["seconds"] > 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_rehearsal_refuses_a_text_that_the_run_would_refuse(name, ask, tmp_path):
    code, _, err = ask(name, text=tmp_path / "missing.txt")
    assert code == 2 and "missing.txt" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["refactor", "calibrate", "prune", "adopt", "recover"])
def test_a_rehearsal_says_that_the_output_is_taken(name, ask, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, err = ask(name)
    assert code == 2 and "exists" in err
    (tmp_path / "out").rmdir()
    (tmp_path / "out.partial").mkdir()
    assert "unfinished work" in ask(name)[2]
    assert ask(name, "--force")[0] == 0 and (tmp_path / "out.partial").is_dir(), "a rehearsal touches nothing"


@pytest.mark.parametrize("name", ["frontier", "skip", "trace", "recover"])
def test_too_little_memory_ends_the_run_before_its_work(name, ask, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 0)
    monkeypatch.setattr(resources, "resident_memory", lambda: 0)
    code, out, err = ask(name)
    assert code == 3 and "of memory" in err and "peak_memory_bytes" in out


def test_work_does_not_begin_in_a_rehearsal_and_does_outside(tmp_path):
    done = []

    def job(size):
        begin({"peak_memory_bytes": size, "disk_bytes": 0})
        done.append(size)

    assert rehearse(job, 7).peak_memory_bytes == 7 and not done
    job(1)
    assert done == [1]
    with pytest.raises(DoesNotFit):
        job(1 << 60)
    with pytest.raises(UsageError):
        rehearse(moe_prism.measure_frontier, tmp_path / "nothing")


@pytest.mark.parametrize(("low_memory", "reads"), [(True, 2), (False, 3)])
def test_every_reading_of_the_weights_takes_time(tiny_source, tiny_calibration, monkeypatch, low_memory, reads):
    """A pass and a solution of a layer that is there are one reading, apart they are two; writing is another."""
    known = defaultdict(Seconds, load=Seconds(1.0, 1.0))
    monkeypatch.setattr(job_times, "_refactor_known", lambda *_: known)
    monkeypatch.setattr(job_times, "written", lambda _: Seconds())
    options = moe_prism.RefactorOptions(calibration=replace(tiny_calibration, low_memory=low_memory), profile_tokens=0)
    text = calibration_windows(tiny_source, options.calibration)
    found = job_times.refactor_time(Weights(tiny_source), text, options, 1)
    assert found is not None and found.cpu == reads


@pytest.mark.parametrize("name", by_night(COMMANDS, "refactor", "frontier", "trace"))
def test_every_rehearsal_can_be_for_another_machine(name, ask, monkeypatch):
    monkeypatch.setattr(resources, "available_memory", lambda: 0)
    monkeypatch.setattr(resources, "resident_memory", lambda: 0)
    code, out, _ = ask(name, "--json", "--for-machine", "ram=64GB,cores=32,disk=1TB")
    assert code == 0 and json.loads(out)["machine"] == {"ram": 64 * 10**9, "cores": 32, "disk": 10**12}
    code, out, err = ask(name, "--json", "--for-machine", "ram=1MiB")
    assert code == 3 and "such a machine has 1.0 MiB" in err
    found = json.loads(out)
    assert found["exit_code"] == 3 and found["needed"]["peak_memory_bytes"] > 2**20, "a small machine is told what would do"


def test_another_disk(ask):
    code, _, err = ask("refactor", "--for-machine", "disk=1kB")
    assert code == 3 and "of disk, such a machine has" in err
    assert "such a machine has enough" in ask("refactor", "--for-machine", "disk=1GB")[2]


def test_what_compress_would_write_is_sized_too(capsys):
    from moe_prism import cli

    asked = ["compress", "nano", "--method", "rtn:4", "--dry-run", "--json", "--for-machine"]
    assert cli.main([*asked, "ram=64GB,cores=32"]) == 0
    assert json.loads(capsys.readouterr().out)["needed"]["machine"]["cores"] == 32
    assert cli.main([*asked, "ram=1MiB"]) == 3
    assert json.loads(capsys.readouterr().out)["exit_code"] == 3, "one object"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rams=64GB", "did you mean 'ram'?"),
        ("ram=64GB,ram=1GB", "names 'ram' twice"),
        ("ram", "ram=SIZE"),
        ("ram=much", "no amount of ram"),
        ("cores=2.5", "no number of cores"),
        ("cores=0", "cores=0 is impossible"),
        ("", "ram, cores, disk"),
    ],
)
def test_a_machine_that_is_none_is_refused_in_one_line(ask, text, told):
    code, _, err = ask("refactor", "--for-machine", text)
    assert code == 2 and told in err and len(err.splitlines()) == 1


def test_another_machine_is_sized_and_not_run_on(tiny_source, tmp_path, capsys):
    from moe_prism import cli

    assert cli.main(["refactor", str(tiny_source), "-o", str(tmp_path / "out"), "--for-machine", "ram=64GB"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_more_cores_take_less_time_and_cut_more_experts_at_once(text_file, tmp_path):
    here = {"peak_memory_bytes": 1, "disk_bytes": 1, "seconds": 80.0, "cpu_seconds": 90.0}
    there = on_machine(here, OtherMachine(cores=8 * torch.get_num_threads()))
    assert (there["seconds"], there["cpu_seconds"]) == (10.0, 90.0)
    assert on_machine({**here, "seconds": None}, OtherMachine(cores=1))["seconds"] is None
    assert on_machine(here, OtherMachine(ram=1))["seconds"] == 80.0
    text = moe_prism.CalibrateOptions(text=str(text_file), tokens=4096, length=32, reservoir=64, low_memory=True)
    options = moe_prism.RefactorOptions(calibration=text, profile_tokens=0)
    save_tiny("olmoe", tmp_path / "source", num_experts=64, intermediate_size=512)
    one, eight = (
        rehearse(moe_prism.refactor, tmp_path / "source", tmp_path / "out", options, machine=OtherMachine(cores=cores))
        for cores in (1, 8)
    )
    assert one.peak_memory_bytes < eight.peak_memory_bytes

"""A rehearsal checks what the run checks, says what it needs, and leaves no trace."""

from __future__ import annotations

import json

import pytest

import moe_prism
from moe_prism.errors import DoesNotFit, UsageError
from moe_prism.jobs import pilot, resources
from moe_prism.jobs.rehearsal import begin, rehearse

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

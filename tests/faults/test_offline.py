"""Faults F01, F03, F04, F09, F11, F14: what can go wrong around `refactor`, in the process and at chosen points of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_prism
from moe_prism import cli
from moe_prism.checkpoint import Journal
from moe_prism.checkpoint import journal as journal_module
from moe_prism.errors import DoesNotFit, UsageError
from tests.faults.points import POINTS, fault, raising
from tests.tiny_sources import digests, save_tiny

SMALL = ("--tokens", "768", "--length", "32", "--reservoir", "128", "--profile-tokens", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    save_tiny("olmoe", folder, num_hidden_layers=3)
    return folder


@pytest.fixture
def refactor(model, text_file, capsys):
    """(exit code, lines of stderr) of the command."""

    def run(out, *more):
        code = cli.main(["refactor", str(model), "-o", str(out), "--text", str(text_file), *SMALL, *more])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, [line for line in said.splitlines() if "error" in line]

    return run


@pytest.fixture(scope="module")
def wanted(model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted") / "out"
    assert cli.main(["refactor", str(model), "-o", str(out), "--text", str(text_file), *SMALL]) == 0
    return digests(out)


def test_every_point_is_passed(model, text_file, tmp_path):
    """Of those in `refactor`; tests/serve passes the others."""
    for name in ("write", "note", "rename", "layer"):
        with pytest.raises(ZeroDivisionError), fault(name, raising(ZeroDivisionError()), at=1) as seen:
            cli.main(["refactor", str(model), "-o", str(tmp_path / name), "--text", str(text_file), *SMALL])
        assert seen.times == 1
    assert all(callable(getattr(*point.home())) for point in POINTS.values())


def test_f01_no_layer_that_was_finished_is_solved_again(refactor, wanted, tmp_path):
    with fault("layer", raising(KeyboardInterrupt()), at=3):
        assert refactor(tmp_path / "out")[0] == cli.INTERRUPTED
    with fault("layer", lambda *_, **__: None) as again:
        assert refactor(tmp_path / "out", "--resume")[0] == 0
    assert again.times == 1 and digests(tmp_path / "out") == wanted


def test_f03_an_interrupt_stops_the_layer_at_work(refactor, wanted, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
    with fault("layer", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT), at=2) as seen:
        code, lines = refactor(tmp_path / "out")
    assert code == cli.INTERRUPTED and seen.times == 2 and len(lines) == 1 and "--resume" in lines[0]
    assert not (tmp_path / "out").exists()
    assert refactor(tmp_path / "out", "--resume")[0] == 0 and digests(tmp_path / "out") == wanted


@pytest.mark.slow
def test_f03_two_interrupts_are_no_worse_than_one(model, text_file, wanted, tmp_path):
    """The second comes while the first is being answered."""
    code = (
        "import os, signal, sys; from moe_prism import cli; from tests.faults.points import fault\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "fail = cli._fail\n"
        "def told(*a):\n    os.kill(os.getpid(), signal.SIGINT); return fail(*a)\n"
        "cli._fail = told\n"
        "with fault('layer', lambda *_, **__: os.kill(os.getpid(), signal.SIGINT), at=2):\n    sys.exit(cli.main(sys.argv[1:]))\n"
    )
    root = Path(__file__).parents[2]
    arguments = ["refactor", str(model), "-o", str(tmp_path / "out"), "--text", str(text_file), *SMALL]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=own, capture_output=True, text=True, timeout=250)
    assert done.returncode in (cli.INTERRUPTED, -signal.SIGINT) and not (tmp_path / "out").exists(), done.stderr
    assert cli.main([*arguments, "--resume"]) == 0 and digests(tmp_path / "out") == wanted


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(9, marks=pytest.mark.slow)])
def test_f04_a_disk_that_fills_at_any_write_loses_nothing_before_it(refactor, wanted, tmp_path, at):
    with fault("sync", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), at=at) as seen:
        code, lines = refactor(tmp_path / "out")
    assert code == 3 and seen.times >= at and len(lines) == 1, lines
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob("*.tmp*"))
    assert refactor(tmp_path / "out", "--resume")[0] == 0 and digests(tmp_path / "out") == wanted


def test_f04_a_file_that_does_not_fit_names_what_helps(refactor, tmp_path):
    with fault("write", raising(DoesNotFit("disk full", "free space, then use --resume")), at=2):
        code, lines = refactor(tmp_path / "out")
    assert code == 3 and "--resume" in lines[0]


@torch.no_grad()
def test_f09_one_token_all_tokens_to_one_expert_and_no_text(text_file, tmp_path, capsys):
    """Nothing is divided by zero, and what is written is exact at the full budget."""
    made = save_tiny("olmoe", tmp_path / "model", num_experts=6)
    gate, same = made.model.layers[1].mlp.gate.weight, made.model.layers[1].post_attention_layernorm.weight
    gate.zero_()
    gate[0], gate[1] = same, same  # two experts take nearly every token of the second layer
    made.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    few = ("--tokens", "32", "--length", "32", "--reservoir", "64", "--profile-tokens", "32")
    assert cli.main(["refactor", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--text", str(text_file), *few]) == 0
    model, tokenizer = moe_prism.load(tmp_path / "out")
    ids = tokenizer("import os\n\ndef main():", return_tensors="pt").input_ids
    full = model(ids).logits
    torch.testing.assert_close(full, made.float()(ids).logits, rtol=1e-4, atol=1e-4 * float(full.abs().max()))
    with moe_prism.operating_point(model, 0.5):
        assert torch.isfinite(model(ids).logits).all()
    (tmp_path / "nothing.txt").write_text("")
    capsys.readouterr()
    arguments = ["refactor", str(tmp_path / "model"), "-o", str(tmp_path / "none"), "--text", str(tmp_path / "nothing.txt")]
    assert cli.main(arguments) == 2 and not (tmp_path / "none").exists()
    assert len([line for line in capsys.readouterr().err.splitlines() if "error" in line]) == 1


def test_f11_memory_that_runs_out_is_one_line_and_what_was_done_is_kept(refactor, wanted, tmp_path):
    for number, error in enumerate((MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"))):
        out = tmp_path / str(number)
        with fault("layer", raising(error), at=2):
            code, lines = refactor(out)
        assert code == 3 and len(lines) == 1 and "memory" in lines[0] and "--low-memory" in lines[0]
        assert not out.exists()
        with fault("layer", lambda *_, **__: None) as again:
            assert refactor(out, "--resume")[0] == 0
        assert again.times == 2 and digests(out) == wanted


NO_MORE = """
import resource, sys
from moe_prism import cli
from tests.faults.points import fault

def no_more(*_, **__):
    held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held, resource.getrlimit(resource.RLIMIT_DATA)[1]))

with fault("layer", no_more, at=2):
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc that says what a process holds")
def test_f11_a_limit_that_the_kernel_keeps(text_file, tmp_path):
    """A process may hold no more than it does when its second layer begins: whoever asks the system for memory then is told no."""
    save_tiny("olmoe", tmp_path / "model", num_hidden_layers=3, hidden_size=256, intermediate_size=1024)
    root = Path(__file__).parents[2]
    arguments = ["refactor", str(tmp_path / "model"), "--text", str(text_file), *SMALL, "-o"]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NO_MORE, *arguments, str(tmp_path / "out")]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=250)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 3 and len(lines) == 1 and "memory ran out; use --low-memory" in lines[0], done.stderr[-2000:]
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "unit-000.safetensors").is_file()
    with fault("layer", lambda *_, **__: None) as again:
        assert cli.main([*arguments, str(tmp_path / "out"), "--resume"]) == 0
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    assert again.times == 2 and digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_f11_another_error_of_a_run_is_not_taken_for_it(refactor, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), fault("layer", raising(RuntimeError("a bug"))):
        refactor(tmp_path / "out")


@pytest.mark.parametrize(("name", "other"), [("versions", {"torch": "0.1"}), ("device", "a TPU")])
def test_f14_another_library_or_device_is_refused_with_both(tmp_path, monkeypatch, name, other):
    Journal(tmp_path, {"seed": 1})
    then = json.loads((tmp_path / "journal.json").read_text())["fingerprint"][name]
    monkeypatch.setattr(journal_module, name, lambda: other)
    with pytest.raises(UsageError, match=f"another {name}: ") as caught:
        Journal(tmp_path, {"seed": 1})
    assert repr(other) in str(caught.value) and repr(then)[:100] in str(caught.value) and "--force" in caught.value.next_step

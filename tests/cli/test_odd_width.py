"""Experts whose rows are not whole 16 bytes, width 30 in float32, which torch's grouped product refuses: every command works."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_prism import cli
from moe_prism.model import load_model
from tests.tiny_sources import save_tiny

TEXT = ("--tokens", "512", "--length", "32")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    save_tiny("olmoe", folder / "source", intermediate_size=30)
    return folder


@pytest.fixture(scope="module")
def text(text_file):
    return ("--text", str(text_file), *TEXT)


@pytest.fixture(scope="module")
def elastic(odd, text):
    words = ["refactor", str(odd / "source"), "-o", str(odd / "elastic"), "--n-sub", "5", *text, "--profile-tokens", "64"]
    assert cli.main(words) == 0
    return odd / "elastic"


def test_torch_still_refuses_such_rows(odd):
    """The day this passes, the detour can go."""
    model = AutoModelForCausalLM.from_pretrained(odd / "source")
    with pytest.raises(RuntimeError, match="16 bytes"):
        model(torch.arange(24)[None])


def test_full_budget_is_the_model(odd, elastic):
    ids = torch.arange(24)[None]
    with torch.no_grad():
        a, b = (load_model(folder, torch.float32)(ids).logits for folder in (odd / "source", elastic))
    assert float((a - b).abs().max() / a.abs().max()) < 1e-5


COMMANDS = {
    "inspect": ("inspect", "{source}"),
    "calibrate": ("calibrate", "{source}", "-o", "{out}", *TEXT, "--text", "{text}"),
    "low memory": ("refactor", "{source}", "-o", "{out}", "--n-sub", "5", "--low-memory", *TEXT, "--text", "{text}"),
    "prune": ("prune", "{source}", "-o", "{out}", *TEXT, "--text", "{text}"),
    "prune measured": (
        "prune", "{source}", "--report-only", "--allocation", "measured", "--profile-tokens", "64", *TEXT, "--text", "{text}"
    ),
    "skip": ("skip", "{source}", "-o", "{out}", "--method", "uniform", "--mean", "1", *TEXT, "--text", "{text}"),
    "frontier": (
        "frontier", "{elastic}", "-o", "{out}", "--text", "{text}", "--tokens", "256", "--length", "32", "--methods", "product,ser",
        "--per-method", "2",
    ),
    "frontier of the source": (
        "frontier", "{source}", "-o", "{out}", "--text", "{text}", "--tokens", "256", "--length", "32", "--methods", "uniform",
        "--per-method", "2",
    ),
    "generate": ("generate", "{elastic}", "--prompt", "x", "--budget", "0.4", "--max-tokens", "3"),
    "generate at full budget": ("generate", "{elastic}", "--prompt", "x", "--max-tokens", "3"),
    "from the store": ("generate", "{elastic}", "--prompt", "x", "--budget", "0.4", "--max-tokens", "3", "--expert-memory", "60KB"),
    "trace": ("trace", "{source}", "-o", "{out}", "--prompt", "8", *TEXT, "--text", "{text}"),
    "recover": ("recover", "{elastic}", "-o", "{out}", *TEXT, "--text", "{text}"),
    "verify": ("verify", "{elastic}"),
}  # fmt: skip


FAST = ("inspect", "prune", "generate", "verify")


@pytest.mark.parametrize("command", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in COMMANDS])
def test_every_command_works(command, odd, elastic, text_file, tmp_path, capsys):
    places = {
        "source": odd / "source",
        "elastic": elastic,
        "out": tmp_path / "out.json" if command == "skip" else tmp_path / "out",
    }
    code = cli.main([part.format(**places, text=text_file) for part in COMMANDS[command]])
    assert code == 0, capsys.readouterr().err


def test_a_skip_plan_runs(odd, text, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    assert cli.main(["skip", str(odd / "source"), "-o", str(plan), "--method", "uniform", "--mean", "1", *text]) == 0
    capsys.readouterr()
    words = ["generate", str(odd / "source"), "--prompt", "x", "--plan", str(plan), "--max-tokens", "3", "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3

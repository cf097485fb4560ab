"""Help, and refusals of what needs no model, come before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from .test_cli import COMMANDS


def test_help_needs_no_torch():
    script = """
import contextlib, io, sys
from moe_prism.cli import main
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([command, "--help"] if command != "top" else ["--help"])
    assert code == 0 and "Usage: moe-prism" in out.getvalue(), (command, out.getvalue())
    assert command in ("top", "demo", "doctor", "ls", "serve") or "--json" in out.getvalue()
print(sorted({"torch", "transformers", "numba"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script, "top", *COMMANDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_what_needs_no_torch_is_refused_without_it(tiny_source, elastic_tiny, tmp_path):
    """Wrong options, models that are not there, files that are not whole: a command imports what it works with after that."""
    short, gone, unknown, keys = (shutil.copytree(tiny_source, tmp_path / name) for name in ("short", "gone", "unknown", "keys"))
    shard = min(short.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    (gone / shard.name).unlink()
    index = json.loads((unknown / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.unknown.weight"] = shard.name
    (unknown / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((keys / "config.json").read_text())
    (keys / "config.json").write_text(json.dumps({**config, **{f"k{i}": i for i in range(3000)}}))
    (tmp_path / "frontier.json").write_text("{")
    out = ["-o", str(tmp_path / "out")]
    cases = {
        2: [
            ["refactor", "nano", *out, "--n-sub", "1"],
            ["refactor", "nano", *out, "--solver", "best"],
            ["refactor", "nano", *out, "--compensate", "best"],
            ["refactor", "nano", *out, "--extra-scorers", "best"],
            ["calibrate", "nano", *out, "--collectors", "best"],
            ["prune", "nano", *out, "--criterion", "best"],
            ["recover", "nano", *out, "--method", "best"],
            *(
                ["generate", "nano", "--prompt", "x", *wrong]
                for wrong in (["--budget", "3"], ["--rule", "best"], ["--decode", "best"])
            ),
            *(["frontier", "nano", *out, *wrong] for wrong in (["--methods", "prune:energy,best"], ["--compare", "best"])),
            *(
                [command, "nano", *out, "--text", "nowhere"]
                for command in ("refactor", "calibrate", "prune", "frontier", "skip", "trace")
            ),
            *([command, "nano", *out, "--method", "best"] for command in ("skip", "compress")),
            ["generate", str(elastic_tiny), "--prompt", "x", "--point", "best"],
            ["calibrate", "nano", *out, "--domain", "code=nowhere"],
            *(["serve", "nano", *wrong] for wrong in (["--policy", "best"], ["--config", "nowhere"], ["--points", "best"])),
            *([command, "nowhere", *out] for command in ("refactor", "calibrate", "prune", "trace", "recover")),
            *([command, "nowhere"] for command in ("inspect", "frontier", "generate", "verify")),
            *([command, "nano", "-o", str(short)] for command in ("refactor", "calibrate", "prune", "recover")),  # it exists
            *([command, "nano", "-o", str(tmp_path)] for command in ("trace", "skip")),
            *(
                [command, str(elastic_tiny), *asks, "--expert-memory", *wrong]
                for command, *asks in (("serve",), ("generate", "--prompt", "x"))
                for wrong in (["lots"], *(["1MB", f"--expert-{what}", "best"] for what in ("policy", "predictor", "settings")))
            ),
            ["offload", str(elastic_tiny), "--memory", "lots"],
            ["offload", "fit", "nano", *out, "--policy", "best"],
            ["generate", str(tiny_source), "--prompt", "x", "--point", "best"],
            ["serve", str(tiny_source), "--config", "nowhere"],
            ["eval", str(tiny_source), "--tasks", "x"],  # nowhere to write to
            ["bench", "http://127.0.0.1", "--compare", str(elastic_tiny)],
        ],
        4: [
            *(["refactor", str(folder), *out] for folder in (short, gone, unknown, keys)),
            *(["inspect", str(folder)] for folder in (short, gone, unknown, keys)),
            ["report", str(tmp_path / "frontier.json")],
        ],
        0: [["ls", "solvers"], ["ls", "collectors"], ["ls", "families"]],
    }
    script = """
import json, sys
from moe_prism.cli import main
for code, commands in json.loads(sys.argv[1]).items():
    for words in commands:
        assert main(words) == int(code), words
        assert not {"torch", "transformers", "numba"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", script, json.dumps(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

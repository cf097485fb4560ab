"""`python -m moe_prism` is the command."""

import os
import subprocess
import sys

import moe_prism

from .pages import ROOT


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", "moe_prism", *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_help_and_version():
    done = run("--help")
    assert done.returncode == 0 and "Usage: moe-prism COMMAND" in done.stdout and "refactor" in done.stdout
    assert run("--version").stdout.strip() == moe_prism.__version__


def test_exit_codes_are_those_of_the_command():
    done = run("verify", "missing")
    assert done.returncode == 2 and done.stderr.startswith("moe-prism: error: ") and "Traceback" not in done.stderr

"""Clients as they are, against a server of ours: `make test-clients` makes their environment.

A client that could not be installed is skipped by name, so that a run says which were tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

pytestmark = [pytest.mark.release, pytest.mark.slow, pytest.mark.timeout(1200)]

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PLACE = Path(os.environ.get("CLIENTS", ROOT / ".venv-clients"))


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """What it printed."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", **environment}
    own.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=own, capture_output=True, text=True, check=False, timeout=1100
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def python_with(*packages: str) -> Path:
    """The environment's Python, if these can be imported in it."""
    python = PLACE / "bin" / "python"
    for package in packages:
        there = (
            python.is_file()
            and not subprocess.run([str(python), "-c", f"import {package}"], capture_output=True, check=False).returncode
        )
        if not there:
            pytest.skip(f"{package} is not in {PLACE}")
    return python


def test_openai_of_python(chat_house):
    assert run(python_with("openai"), HERE / "openai_client.py", chat_house.url).endswith("ok\n")


def test_openai_of_javascript(chat_house, tmp_path):
    node, modules = shutil.which("node"), PLACE / "node_modules"
    if node is None or not (modules / "openai").is_dir():
        pytest.skip(f"no node, or no openai in {modules}")
    (tmp_path / "node_modules").symlink_to(modules)
    shutil.copy(HERE / "openai_client.mjs", tmp_path)
    assert run(node, "openai_client.mjs", chat_house.url, cwd=tmp_path).endswith("ok\n")


def test_langchain(chat_house):
    assert run(python_with("langchain_openai"), HERE / "langchain_client.py", chat_house.url).endswith("ok\n")


def test_guidellm(house, tmp_path):
    """Its own benchmark over HTTP, with prompts that it makes with the model's tokenizer."""
    python_with("guidellm")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"def f{i}(x):", "output_tokens_count": 4}) + "\n" for i in range(12)))
    backend = f"kind=openai_http,target={house.root},model=tiny,request_format=/v1/completions"
    command = [PLACE / "bin" / "guidellm", "run", "--disable-console", "--backend", backend, "--profile", "kind=synchronous"]
    command += ["--constraint", "kind=max_requests,count=6", "--data", f"kind=json_file,path={data}"]
    command += [
        "--tokenizer",
        f"kind=huggingface_auto,model={house.folder}",
        "--output",
        f"kind=json,path={tmp_path / 'out.json'}",
    ]
    run(*command, cwd=tmp_path)
    said = json.dumps(json.loads((tmp_path / "out.json").read_text()))
    assert '"errored": 0' in said or '"errored": []' in said

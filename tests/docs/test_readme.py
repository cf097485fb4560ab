"""Every command and example of README.md is run, block by block, in one folder.

What a reader gets from earlier commands stands ready: `demo/model` is a refactored prism-nano. Commands run as they are written, by
bash, with two changes: `moe-prism` is served by one warm process (warm.py), which also lowers `--tokens`, `--length` and
`--max-tokens` where a command does not give them. Not run: `make` (its targets are looked up), `git clone`, `cd` into it and
the activation of its environment, `pip install`, and a block after `<!-- not run: reason -->`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from .warm import CLIENT, smaller

ROOT = Path(__file__).parents[2]
LANGUAGES = ("bash", "console", "python")
BLOCK = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>.*?)\s*-->\s*)?^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```\s*$", re.S | re.M
)
ELSEWHERE = re.compile(r"^(make|git clone|cd moe-prism|source .venv/bin/activate|(python3? -m )?pip install)\b")


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    reason: str | None  # why it is not run

    @property
    def commands(self) -> str:
        """The shell lines to run: prompts and expected output taken off a console block, set-up of the repository left out."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console" and any(line.startswith("$ ") for line in lines):  # without prompts all lines are commands
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return "\n".join(line for line in lines if not ELSEWHERE.match(line.strip()))


def blocks(text: str) -> list[Block]:
    found = [Block(m["language"], m["body"], m["reason"]) for m in BLOCK.finditer(text)]
    return [block for block in found if block.language in LANGUAGES]


def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def run(block: Block, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-euo", "pipefail", "-c", block.commands]
    command = [environment["CLIENT"], "-c", block.body] if block.language == "python" else shell
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the `moe-prism` that the README's commands find, and the process behind it."""
    folder = tmp_path_factory.mktemp("bin")
    client = folder / "moe-prism"
    with tempfile.TemporaryDirectory() as short:  # the name of a socket may have some hundred characters only
        address = str(Path(short) / "s")
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
        command = [sys.executable, "-m", "tests.docs.warm", address]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "ready\n"
            yield folder
            server.kill()


@pytest.fixture
def workplace(programs, elastic_nano, tmp_path):
    """(folder, environment) in which the README's examples run."""
    shutil.copytree(elastic_nano, tmp_path / "demo" / "model")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return tmp_path, {**os.environ, "PATH": path, "CLIENT": str(programs / "moe-prism")}


def test_every_block_of_the_readme_runs(workplace):
    folder, environment = workplace
    for block in blocks(readme()):
        if block.reason or not (block.language == "python" or block.commands.strip()):
            continue
        done = run(block, folder, environment)
        assert done.returncode == 0, f"```{block.language}\n{block.body}```\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def test_every_make_target_of_the_readme_exists():
    named = {t for block in blocks(readme()) for t in re.findall(r"^(?:\$ )?make ([\w-]+)", block.body, re.M)}
    named |= set(re.findall(r"`make ([\w-]+)`", readme()))
    assert named <= targets(), named - targets()
    assert {"demo", "test"} <= targets()


def test_every_file_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", readme()) + re.findall(
        r"(?:src|href)=\"(?!https?:|#)([^\"#]+)", readme()
    )
    assert all((ROOT / link).exists() for link in links), [link for link in links if not (ROOT / link).exists()]


EXAMPLE = """
```bash
git clone https://example.org/moe-prism
make demo   # a comment
moe-prism ls \\
    rules
```

```console
$ moe-prism generate demo/model --prompt "import" --max-tokens 2
import os
```

<!-- not run: needs a GPU -->
```bash
false
```

```python
import moe_prism

model, tokenizer = moe_prism.load("demo/model")
```

```json
{"not": "run"}
```
"""


def test_the_runner_itself(workplace):
    folder, environment = workplace
    first, second, skipped, python = blocks(EXAMPLE)
    assert first.commands.split() == ["moe-prism", "ls", "rules"]
    assert second.commands == 'moe-prism generate demo/model --prompt "import" --max-tokens 2'
    assert skipped.reason == "needs a GPU" and python.reason is None and python.language == "python"
    done = run(second, folder, environment)
    assert done.returncode == 0 and done.stdout.startswith("import")
    assert run(Block("bash", "moe-prism verify missing | cat", None), folder, environment).returncode == 2
    assert run(python, folder, environment).returncode == 0
    failed = run(Block("python", "raise ValueError('no')", None), folder, environment)
    assert failed.returncode == 1 and "ValueError: no" in failed.stderr
    assert smaller(["generate", "x", "--max-tokens", "9"]) == ["generate", "x", "--max-tokens", "9"]
    assert smaller(["frontier", "x", "--tokens", "9"]) == ["frontier", "x", "--tokens", "9", "--length", "128"]

"""Every command and example of README.md and of the pages in docs/ is run, block by block, one folder per section.

What a reader gets from earlier commands stands ready: `demo/model` is a refactored prism-nano, and so is `elastic` where a section does not
make it itself. Commands run as they are written, by bash, with two changes: `moe-prism` is served by one warm process (warm.py), which
also lowers `--tokens`, `--length` and the like where a command does not give them. Not run: `make` (its targets are looked up), `git
clone`, `cd` into it and the activation of its environment, `pip install`, `python benchmarks/...`, and a block after `<!-- not run:
reason -->`. What is not run is parsed (test_commands.py).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from .pages import Block, blocks, name, pages, sections
from .warm import smaller


def run(block: Block, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-euo", "pipefail", "-c", block.commands]
    command = [environment["CLIENT"], "-c", block.body] if block.language == "python" else shell
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def to_run(text: str) -> list[Block]:
    return [b for b in blocks(text) if not b.reason and (b.language == "python" or b.commands.strip())]


FAST = ("README.md:Try it", "README.md:What it costs in quality", "README.md:Serve it")
"""The sections that take seconds. The others take a minute each; test_commands.py parses every command of theirs with every commit."""


def parts() -> list[ParameterSet]:
    """The sections that hold something to run."""
    return [
        pytest.param(text, id=section, marks=() if section in FAST else pytest.mark.slow)
        for page in pages()
        for heading, text in sections(page.read_text("utf-8")).items()
        if to_run(text) and (section := f"{name(page)}:{heading}")
    ]


@pytest.mark.timeout(1200)  # a section may hold several commands of minutes
@pytest.mark.parametrize("text", parts())
def test_every_block_of_a_section_runs(text, workplace, elastic_nano):
    folder, environment = workplace
    wanted = to_run(text)
    if not any("-o elastic " in f"{line} " for block in wanted for line in block.lines):
        shutil.copytree(elastic_nano, folder / "elastic")
    for block in wanted:
        done = run(block, folder, environment)
        assert done.returncode == 0, f"```{block.language}\n{block.body}```\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


EXAMPLE = """
```bash
git clone https://example.org/moe-prism
make demo   # a comment
moe-prism ls \\
    methods
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
    assert first.commands.split() == ["moe-prism", "ls", "methods"]
    assert second.commands == 'moe-prism generate demo/model --prompt "import" --max-tokens 2'
    assert skipped.reason == "needs a GPU" and python.reason is None and python.language == "python"
    done = run(second, folder, environment)
    assert done.returncode == 0 and done.stdout.startswith("import")
    assert run(Block("bash", "moe-prism verify missing | cat", None), folder, environment).returncode == 2
    assert run(python, folder, environment).returncode == 0
    failed = run(Block("python", "raise ValueError('no')", None), folder, environment)
    assert failed.returncode == 1 and "ValueError: no" in failed.stderr
    assert smaller(["generate", "x", "--max-tokens", "9"]) == ["generate", "x", "--max-tokens", "9"]
    given = ["frontier", "x", "--tokens", "9", "--calibration-tokens", "9"]
    assert smaller(given) == [*given, "--length", "128"]

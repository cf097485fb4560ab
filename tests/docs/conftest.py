"""The folder in which commands of the documentation run, and the `moe-prism` that they find there."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics as TOPICS

import pytest

from .pages import ROOT
from .warm import CLIENT


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the `moe-prism` that commands find, and the process behind it."""
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


def lay_out(folder: Path) -> None:
    """The files that a reader of the pages has: conversations, a table, tasks, and the recipe of an earlier section."""
    topics = [(f"What is said of {name}?", text) for name, text in list(TOPICS.items())[:40]]
    with (folder / "chats.jsonl").open("w") as chats, (folder / "tasks.jsonl").open("w") as tasks:
        for question, answer in topics:
            turns = ("user", question), ("assistant", answer)
            chats.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
            tasks.write(json.dumps({"prompt": question}) + "\n")
    written = re.search(
        r"^cat > recipe\.yaml <<'END'\n(.*?)^END$", (ROOT / "docs/how-to/recipes.md").read_text("utf-8"), re.S | re.M
    )
    (folder / "recipe.yaml").write_text(written[1])
    with (folder / "qa.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("question", "answer"), *topics])


@pytest.fixture
def workplace(programs, elastic_nano, tmp_path):
    """(folder, environment). `demo/model` is what `make demo` has left: a refactored prism-nano."""
    lay_out(tmp_path)
    shutil.copytree(elastic_nano, tmp_path / "demo" / "model")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return tmp_path, {**os.environ, "PATH": path, "CLIENT": str(programs / "moe-prism")}

"""Blocks of the documentation that need a server: the server that a page starts is started, and asked what the page asks it.

A block is one of these where the reason before it (`<!-- not run: ... -->`) says "server". Its `moe-prism serve` runs on a free port
until the next one, or the page's end; commands and Python code go to that port, on less load. What a page takes as given, `PREPARED`
makes. vLLM has tests of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from moe_prism.model.named import NANO
from tests.adapters.tuned import fine_tune

from .pages import Block, blocks, name, pages
from .test_readme import run

PORT = "8000"
LESS = (
    (r"--seconds \d+", ""),
    (r"^moe-prism bench .*", r"\g<0> --seconds 4"),
    (r"--repeats \d+", "--repeats 1"),
    (r"--methods all-per-token", r"\g<0> --per-method 2"),
)
"""Of what a page's command says -> what is run. How much is measured is not what is tested."""


def with_adapters(folder: Path, environment: dict[str, str]) -> None:
    """A fine-tune of nano, two adapters of it, and an administrator's key."""
    layers = json.loads((NANO / "config.json").read_text())["num_hidden_layers"]
    fine_tune(NANO, folder / "tuned", [[0], *[[]] * (layers - 1)])
    for out in ("adapters/prose", "web-adapter"):
        command = Block("bash", f"moe-prism adapter tuned --base nano -o {out}\n", None)
        done = run(command, folder, environment)
        assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(folder / "adapters" / "prose", folder / "prose")
    (folder / "admin.keys").write_text("secret\n")
    environment["ADMIN_KEY"] = "secret"


PREPARED = {"docs/how-to/serve-fine-tunes.md": with_adapters}
"""Page -> what it takes as given: a function of folder and environment."""


def wants_a_server(block: Block) -> bool:
    return bool(block.reason) and "server" in block.reason and not {"vllm", "lm_eval"} & {*re.findall(r"\w+", block.reason)}


PAGES = [page for page in pages() if any(map(wants_a_server, blocks(page.read_text("utf-8"))))]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Page:
    """A reader who follows a page, with one server at a time."""

    def __init__(self, folder, environment) -> None:
        self.folder, self.environment, self.port, self.server, self.code = folder, environment, PORT, None, ""
        self.records = False  # the server writes a file when it stops

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(60) == 0
            self.server = None

    def serve(self, line: str) -> None:
        """Until it answers, however long that takes on this machine; a server that ends is heard of."""
        self.stop()
        self.port, self.records = free_port(), "--trace-out" in line
        words = line.partition("#")[0].replace("&", "").split()[1:]
        command = [sys.executable, "-m", "moe_prism", *words, "--port", self.port, "--probe-seconds", "1"]
        log = self.folder / f"server-{self.port}.log"
        with log.open("w") as said:
            self.server = subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=said)
        while self.server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(log.read_text()[-2000:])

    def ask_and_stop(self) -> None:
        """What a reader does between starting a server that records and using the record."""
        self.records = False
        for text in ("import os", "def main(", "class Stack:", "for name in"):
            asked = json.dumps({"prompt": text, "max_tokens": 32}).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", asked, headers)
            with urllib.request.urlopen(request) as answer:
                assert answer.status == 200
        self.stop()

    def follow(self, block: Block) -> None:
        if block.language == "python":
            self.code += block.body.replace(PORT, self.port)
            done = subprocess.run([sys.executable, "-c", self.code], cwd=self.folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            return
        for line in block.commands.splitlines():
            if line.startswith("moe-prism serve"):
                self.serve(line)
            elif line.strip():
                if self.records:
                    self.ask_and_stop()
                for much, less in LESS:
                    line = re.sub(much, less, line)
                done = run(Block("bash", line.replace(f":{PORT}", f":{self.port}") + "\n", None), self.folder, self.environment)
                assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_asks_a_server(page, workplace, elastic_nano):
    pytest.importorskip("fastapi")
    folder, environment = workplace
    if "refactor nano -o elastic" not in page.read_text("utf-8") or page.name != "serve.md":
        shutil.copytree(elastic_nano, folder / "elastic")
    PREPARED.get(name(page), lambda *_: None)(folder, environment)
    reader = Page(folder, {**environment, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})
    try:
        for block in blocks(page.read_text("utf-8")):
            if wants_a_server(block):
                reader.follow(block)
        reader.stop()
    finally:
        if reader.server is not None:
            reader.server.kill()
            reader.server.wait()


def test_every_page_with_a_server_is_followed():
    assert {"README.md", "docs/how-to/serve.md", "docs/tutorials/first-elastic-model.md"} <= set(map(name, PAGES))

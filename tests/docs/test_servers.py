"""Blocks of the documentation that need a server: the server that a page starts is started, and asked what the page asks it.

A block is one of these where the reason before it (`<!-- not run: ... -->`) says "server". Its `moe-prism serve` runs on a free port
until the next one, or the page's end; commands and Python code go to that port, on less load. vLLM has tests of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from .pages import Block, blocks, name, pages
from .test_readme import run

PORT = "8000"
LESS = (
    (r"--seconds \d+", "--seconds 4"),
    (r"--repeats \d+", "--repeats 1"),
    (r"--compare elastic ", "--compare elastic --seconds 4 "),
)
READY = 180
WAIT = """
import time, urllib.request
for _ in range({seconds}):
    try:
        urllib.request.urlopen('http://127.0.0.1:{port}/health')
        break
    except OSError:
        time.sleep(1)
else:
    raise SystemExit(1)
"""


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

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(60) == 0
            self.server = None

    def serve(self, line: str) -> None:
        self.stop()
        self.port = free_port()
        words = line.partition("#")[0].replace("&", "").split()[1:]
        command = [sys.executable, "-m", "moe_prism", *words, "--port", self.port, "--probe-seconds", "1"]
        log = self.folder / f"server-{self.port}.log"
        self.server = subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=log.open("w"))
        wait = WAIT.format(port=self.port, seconds=READY)
        assert subprocess.run([sys.executable, "-c", wait], check=False).returncode == 0, log.read_text()[-2000:]

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
                for much, less in LESS:
                    line = re.sub(much, less, line)
                done = run(Block("bash", line.replace(f":{PORT}", f":{self.port}") + "\n", None), self.folder, self.environment)
                assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_asks_a_server(page, workplace, elastic_nano):
    pytest.importorskip("fastapi")
    folder, environment = workplace
    if "refactor nano -o elastic" not in page.read_text("utf-8") or page.name != "serve.md":
        shutil.copytree(elastic_nano, folder / "elastic")
    reader = Page(folder, {**environment, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})
    try:
        for block in blocks(page.read_text("utf-8")):
            if wants_a_server(block):
                reader.follow(block)
        reader.stop()
    finally:
        if reader.server is not None:
            reader.server.kill()


def test_every_page_with_a_server_is_followed():
    assert {"README.md", "docs/how-to/serve.md", "docs/tutorials/first-elastic-model.md"} <= set(map(name, PAGES))

"""Faults S14, S15 and X03: the serve command as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx2

from moe_prism import cli
from tests.serve.house import SMALL

BODY = {"prompt": "def main(args):\n    return ", "max_tokens": 100, "temperature": 0}


class Process:
    """`moe-prism serve` in a child; `url` once it is ready."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [
            sys.executable,
            "-c",
            "from moe_prism.cli import entry; entry()",
            "serve",
            str(folder),
            "--port",
            "0",
            "--probe-seconds",
            "0.05",
            *arguments,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.lines: list[dict] = []
        self.url = ""
        for line in self.child.stderr:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] == "ready":
                    self.url = self.lines[-1]["url"].removesuffix("/v1")
                    self.engine = self.lines[-1]["engine"]  # the process that computes
                    break
        assert self.url, self.lines
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.child.stderr:
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.reader.join(10)
        self.child.stderr.close()
        self.child.stdout.close()

    def listening(self, pid: int | None = None) -> set[tuple[str, str]]:
        """Addresses on which the process, or another one of the tree, listens, from the kernel's table."""
        links = {str(p.readlink()) for p in Path(f"/proc/{pid or self.child.pid}/fd").iterdir()}
        inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
        rows = [
            row.split()
            for table in ("tcp", "tcp6")
            for row in Path(f"/proc/{self.child.pid}/net/{table}").read_text().splitlines()[1:]
        ]
        return {tuple(row[1].split(":")) for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.fixture
def process(tiny_levels, tmp_path):
    config = tmp_path / "qos.yaml"
    engine = {**SMALL["engine"], "process": True}  # as an operator starts it
    config.write_text(json.dumps({**SMALL, "engine": engine, "bounds": {"drain_seconds": 20}}))
    process = Process(tiny_levels, "--config", str(config))
    yield process
    process.close()


def ask(url, results):
    results.append(httpx2.post(url + "/v1/completions", json=BODY, timeout=60))


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [pid, *(below for child in children for below in tree(child))]


def keeps_to_itself(process):
    """The tree listens on one address of the loopback and dumps no memory."""
    assert httpx2.post(process.url + "/v1/completions", json={**BODY, "max_tokens": 2}, timeout=60).status_code == 200
    pids = tree(process.child.pid)
    assert process.engine in pids and len(pids) >= 3  # HTTP, the engine, and who turns text into tokens
    port = f"{int(process.url.rpartition(':')[2]):04X}"
    assert {address for pid in pids for address in process.listening(pid)} == {("0100007F", port)}
    inodes = {
        str(p.readlink())[8:-1] for pid in pids for p in Path(f"/proc/{pid}/fd").iterdir() if str(p.readlink())[:8] == "socket:["
    }
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
    assert not [row for row in rows if row[6] in inodes and len(row) > 7], "a Unix socket has a name"
    for pid in (process.child.pid, process.engine):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]


def serves_again(process):
    """After its engine is killed; `process.engine` is the new one then."""
    results: list[httpx2.Response] = []
    with httpx2.Client(base_url=process.url, timeout=60) as web:
        os.kill(process.engine, signal.SIGSTOP)  # so that it cannot end an answer first
        whole = threading.Thread(target=ask, args=(process.url, results))
        whole.start()
        end = time.monotonic() + 60
        while web.get("/ready").json()["requests"] < 1 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(process.engine, signal.SIGKILL)
        whole.join(60)
        while (ready := web.get("/ready")).status_code != 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert ready.json()["status"] == "ready" and web.post("/v1/completions", json=BODY).status_code == 200
    assert [(r.status_code, r.json()["error"]["message"]) for r in results] == [(503, "the engine stopped")]
    while "engine restarted" not in (events := [line["event"] for line in process.lines]) and time.monotonic() < end:
        time.sleep(0.05)  # another thread reads the lines
    assert "the engine's process was killed by signal 9" in events and "engine restarted" in events
    process.engine = next(line["engine"] for line in process.lines if line["event"] == "engine restarted")


def ends_in_order(process):
    """SIGTERM: what was admitted is finished, the rest is refused."""
    results: list[httpx2.Response] = []
    threads = [threading.Thread(target=ask, args=(process.url, results)) for _ in range(6)]
    for thread in threads:
        thread.start()
    with httpx2.Client(base_url=process.url) as web:
        until = time.monotonic() + 30
        while web.get("/ready").json()["requests"] < 6 and len(results) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert {address for address, _ in process.listening()} == {"0100007F"}  # X03: 127.0.0.1 and nothing else
        os.kill(process.engine, signal.SIGTERM)  # a supervisor may send it to all; only the HTTP process heeds it
        os.kill(process.engine, signal.SIGINT)
        process.child.send_signal(signal.SIGTERM)
        refused = web.post("/v1/completions", json=BODY)
        ready = web.get("/ready")
    for thread in threads:
        thread.join(60)
    assert process.child.wait(90) == 0
    assert [r.status_code for r in results] == [200] * 6
    assert refused.status_code == 503 and refused.headers["retry-after"] and ready.json()["status"] == "draining"
    until = time.monotonic() + 10  # another thread reads the lines
    while "stopped" not in (said := [line["event"] for line in process.lines]) and time.monotonic() < until:
        time.sleep(0.05)
    assert [event for event in said if event in ("draining", "stopped")] == ["draining", "stopped"]
    with pytest.raises(ProcessLookupError):
        os.kill(process.engine, 0)


def test_x03_x04_s12_s14_the_life_of_a_server(process):
    """One process for all of it: a start takes ten seconds of a processor."""
    keeps_to_itself(process)
    serves_again(process)
    ends_in_order(process)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["second signal", "drain runs out"])
def test_s14_whoever_is_cut_off_gets_503_in_json(tiny_levels, tmp_path, how):
    config = tmp_path / "qos.yaml"
    drain = {"drain_seconds": 0.2 if how == "drain runs out" else 60}
    config.write_text(json.dumps({**SMALL, "engine": {**SMALL["engine"], "process": True}, "bounds": drain}))
    process = Process(tiny_levels, "--config", str(config))
    try:
        os.kill(process.engine, signal.SIGSTOP)  # so that it ends no answer
        results: list[httpx2.Response] = []
        threads = [threading.Thread(target=ask, args=(process.url, results)) for _ in range(6)]
        for thread in threads:
            thread.start()
        body = {**BODY, "stream": True}
        with httpx2.Client(base_url=process.url, timeout=60) as web, web.stream("POST", "/v1/completions", json=body) as answer:
            end = time.monotonic() + 30
            while httpx2.get(process.url + "/ready").json()["requests"] < 7 and time.monotonic() < end:
                time.sleep(0.005)
            process.child.send_signal(signal.SIGTERM)
            if how == "second signal":
                process.child.send_signal(signal.SIGINT)
            events = [line for line in answer.iter_lines() if line]
        for thread in threads:
            thread.join(60)
        os.kill(process.engine, signal.SIGCONT)
        assert process.child.wait(90) == 0
        assert [r.status_code for r in results] == [503] * 6
        told = [r.json()["error"] for r in results] + [json.loads(events[-1].removeprefix("data: "))["error"]]
        assert {t["message"] for t in told} == {"the server is shutting down"} and {t["type"] for t in told} == {"server_error"}
        with pytest.raises(ProcessLookupError):
            os.kill(process.engine, 0)
    finally:
        process.close()


def test_s15_what_is_wrong_at_the_start_is_one_line(tiny_levels, elastic_tiny, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("engine: {request: 4}\n")
    (tmp_path / "worse.yaml").write_text("engine: {requests: -4}\n")
    (tmp_path / "cost.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = [
            (["--port", str(taken.getsockname()[1])], 2, "cannot listen on 127.0.0.1"),
            (["--port", "70000"], 2, "give at least 0 and at most 65535"),
            (["--host", "0.0.0.0", "--port", "0"], 2, "needs a key"),
            (["--host", "203.0.113.7", "--api-key", "k", "--port", "0"], 2, "cannot listen on 203.0.113.7"),
            (["--policy", "lifo", "--port", "0"], 2, "unknown policy 'lifo'; did you mean 'fifo'?"),
            (["--config", str(tmp_path / "none.yaml"), "--port", "0"], 2, "cannot read"),
            (
                ["--config", str(tmp_path / "bad.yaml"), "--port", "0"],
                2,
                "unknown key 'engine.request', did you mean 'requests'?",
            ),
            (["--config", str(tmp_path / "worse.yaml"), "--port", "0"], 2, "engine.requests: input should be greater than"),
            (["--cost", str(tmp_path / "cost.json"), "--port", "0"], 4, "measure the cost model again"),
            (["--cost", str(tmp_path / "none.json"), "--port", "0"], 2, "--save-cost FILE"),
            (["--probe-seconds", "-1", "--port", "0"], 2, "out of range"),
        ]
        for arguments, code, cause in cases:
            assert cli.main(["serve", str(tiny_levels), *arguments]) == code, arguments
            error = capsys.readouterr().err
            lines = [line for line in error.splitlines() if not line.startswith('{"time"')]  # the log says what it is doing
            assert cause in error and len(lines) == 1 and "Traceback" not in error
    for folder, cause in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "has no config.json")):
        assert cli.main(["serve", str(folder)]) == 2
        assert cause in capsys.readouterr().err


@pytest.mark.parametrize("process", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_s15_truncated_weights_are_one_line(tiny_levels, tmp_path, capfd, process):
    shutil.copytree(tiny_levels, tmp_path / "elastic")
    file = next((tmp_path / "elastic").glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-64])
    (tmp_path / "qos.yaml").write_text(f"engine: {{process: {process}}}\n")
    capfd.readouterr()
    assert cli.main(["serve", str(tmp_path / "elastic"), "--config", str(tmp_path / "qos.yaml"), "--port", "0"]) == 4
    error = capfd.readouterr().err  # of the engine's process too
    assert file.name in error and error.count("\n") == 1 and "Traceback" not in error

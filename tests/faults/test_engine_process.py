"""Faults of the engine's process: it dies, it hangs, it does not come up, and the HTTP process dies before it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx2

from moe_prism import cli
from moe_prism.errors import PrismError
from moe_prism.options.serve import ServeOptions
from moe_prism.serve.config import Config
from moe_prism.serve.http import app, draining
from moe_prism.serve.process import supervisor
from moe_prism.serve.process.messages import Start
from moe_prism.serve.process.spawn import EngineProcess
from tests.serve.house import SMALL, open_house

BODY = {"prompt": "def main(args):\n    return ", "max_tokens": 100, "temperature": 0}
IN_A_PROCESS = {**SMALL["engine"], "process": True}


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended, or does within the time. One that nobody waited for yet has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def post(house, answers, **fields):
    with contextlib.suppress(httpx2.HTTPError):
        answers.append(httpx2.post(house.root + "/v1/completions", json={**BODY, **fields}, timeout=60))


def until(check, seconds=60.0):
    """Waits for it."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)


def status(web, path):
    answer = web.get(path)
    return answer.status_code, answer.json()["status"]


@pytest.mark.slow
def test_s12_s13_an_engine_that_hangs_or_is_killed_is_started_again(tiny_levels, monkeypatch, caplog):
    monkeypatch.setattr(app, "HUNG", 0.6)
    with (
        open_house(tiny_levels, {"engine": IN_A_PROCESS, "bounds": {"step_seconds": 6}}) as house,
        httpx2.Client(base_url=house.root, timeout=60) as web,
    ):
        engine = house.built.service.engine
        expected = web.post("/v1/completions", json={**BODY, "max_tokens": 5}).json()["choices"]
        first = engine.pid
        os.kill(first, signal.SIGSTOP)
        answers: list[httpx2.Response] = []
        waiting = [threading.Thread(target=post, args=(house, answers)) for _ in range(4)]
        for thread in waiting:
            thread.start()
        until(lambda: status(web, "/ready") == (503, "engine hung"))
        assert web.get("/health").status_code == 200  # HTTP itself does not hang
        for thread in waiting:
            thread.join(60)
        assert [(a.status_code, a.json()["error"]["message"]) for a in answers] == [(503, "the engine stopped")] * 4
        assert gone(first) and house.built.door.requests == 0
        assert status(web, "/health") == (200, "engine restarting") and status(web, "/ready") == (503, "engine restarting")
        refused = web.post("/v1/completions", json=BODY)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine" and refused.headers["retry-after"]
        assert web.get("/metrics").status_code == web.get("/status.json").status_code == 200
        until(lambda: status(web, "/ready") == (200, "ready"))
        second = engine.pid
        assert second != first and web.post("/v1/completions", json={**BODY, "max_tokens": 5}).json()["choices"] == expected

        with web.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 120, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(second, signal.SIGSTOP)  # so that it cannot end the answer first
            os.kill(second, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the engine stopped"
        until(lambda: status(web, "/ready") == (200, "ready"))
        assert web.post("/v1/completions", json={**BODY, "max_tokens": 5}).json()["choices"] == expected
        assert 'moe_prism:engine_restarts_total{model_name="tiny"} 2.0' in web.get("/metrics").text
        assert engine.ended() is None and house.idle() == []
    assert gone(engine.pid)
    told = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    hung = "the engine hung: no turn for 6 s (bounds.step_seconds); its process was killed"
    assert told == [hung, "the engine's process was killed by signal 9"]


@pytest.mark.slow
def test_s12_a_crash_loop_ends_after_five_tries(tiny_levels, tmp_path, monkeypatch):
    """The folder is damaged while it is served, so that no engine starts any more."""
    monkeypatch.setattr(draining, "FAREWELL", 60)  # time to look at it
    monkeypatch.setattr(supervisor, "PAUSES", (0.0, 0.1, 0.1, 0.1, 0.1))
    folder = tmp_path / "model"
    shutil.copytree(tiny_levels, folder)
    with open_house(folder, {"engine": IN_A_PROCESS}) as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        (folder / "prism.safetensors").write_bytes(b"nothing of use")
        os.kill(house.built.service.engine.pid, signal.SIGKILL)
        until(lambda: status(web, "/ready") == (503, "engine stopped"), 240)
        assert status(web, "/health") == (503, "engine stopped")
        assert "it was started again 5 times and did not stay" in house.built.service.engine.ended()


def test_an_engine_killed_while_it_starts(tiny_levels):
    process = EngineProcess(Start.of(tiny_levels, ServeOptions(), Config()))
    try:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(PrismError, match="was killed by signal 9 while it started"):
            process.ready()
    finally:
        process.kill()
    assert gone(process.pid)


def test_the_engine_ends_with_the_http_process(tiny_levels):
    """However that ends, and whenever: here by SIGKILL, while the engine loads."""
    code = (
        "import os, sys, signal; from pathlib import Path; from moe_prism.serve.config import Config;"
        "from moe_prism.options.serve import ServeOptions; from moe_prism.serve.process.spawn import EngineProcess;"
        "from moe_prism.serve.process.messages import Start;"
        "print(EngineProcess(Start.of(Path(sys.argv[1]), ServeOptions(), Config())).pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tiny_levels)], stdout=subprocess.PIPE, text=True)
    assert died.returncode == -signal.SIGKILL and gone(int(died.stdout))


@pytest.mark.slow
def test_what_is_wrong_with_a_model_is_the_same_line_from_a_process(tiny_levels, tmp_path, capfd):
    folder, errors = tmp_path / "model", []
    shutil.copytree(tiny_levels, folder)
    (folder / "prism.safetensors").write_bytes(b"nothing of use")
    for process in (False, True):
        config = tmp_path / "qos.yaml"
        config.write_text(json.dumps({"engine": {"process": process}}))
        code = cli.main(["serve", str(folder), "--port", "0", "--config", str(config)])
        errors.append((code, [line for line in capfd.readouterr().err.splitlines() if not line.startswith("{")]))
    assert errors[0] == errors[1] and errors[1][0] == 4 and len(errors[1][1]) == 1


@pytest.mark.slow
def test_an_interrupt_while_it_loads_ends_both(tiny_levels):
    """As a terminal sends it, to the whole group."""
    command = [sys.executable, "-c", "from moe_prism.cli import entry; entry()", "serve", str(tiny_levels), "--port", "0"]
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=default)
    try:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        until = time.monotonic() + 60
        while not (found := children.read_text().split()) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.5)
        os.killpg(server.pid, signal.SIGINT)
        _, said = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == cli.INTERRUPTED and "interrupted" in said and "Traceback" not in said
    assert found and all(gone(int(pid)) for pid in found)

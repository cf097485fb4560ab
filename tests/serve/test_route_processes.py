"""`moe-prism route` before two of our own servers, all three as processes, as an operator starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx2
import yaml

from moe_prism.model.named import NANO
from tests.serve.house import LEVELS, SMALL
from tests.serve.pool_house import nowhere

PROMPT = "import os\n\n\ndef main("
ENGINE = {**SMALL, "engine": {**SMALL["engine"], "requests": 2}}


class Running:
    """A command of ours that serves. url: without /v1."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "moe_prism", *words, "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        self.url = ""
        for line in self.child.stderr:
            self.log.append(line)
            if line.startswith("{") and json.loads(line)["event"] == "ready":
                self.url = json.loads(line)["url"].removesuffix("/v1")
                break
        assert self.url, self.log
        self.reader = threading.Thread(target=lambda: self.log.extend(self.child.stderr), daemon=True)
        self.reader.start()

    def end(self) -> int:
        """By a signal; its exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        code = self.child.wait(60)
        self.reader.join(10)
        self.child.stderr.close()
        return code


@contextmanager
def running(*words: str) -> Iterator[Running]:
    process = Running(*words)
    try:
        yield process
    finally:
        if process.child.poll() is None:
            process.child.kill()
        process.end()


def with_ladder(source: Path, target: Path) -> Path:
    """A folder whose levels need not be measured."""
    shutil.copytree(source, target)
    (target / "ladder.json").write_text(json.dumps({"levels": LEVELS}))
    return target


@pytest.fixture(params=["tiny", "nano"])
def folders(request, tmp_path):
    """An elastic folder with three levels, and a plain one."""
    if request.param == "tiny":
        return request.getfixturevalue("tiny_levels"), request.getfixturevalue("tiny_source")
    return with_ladder(request.getfixturevalue("elastic_nano"), tmp_path / "elastic"), NANO


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_servers_behind_one_endpoint(folders, tmp_path):
    config = tmp_path / "qos.yaml"
    config.write_text(json.dumps(ENGINE))
    serve = ("--config", str(config), "--probe-seconds", "0.05", "--policy", "fifo")
    with ExitStack() as stack:
        elastic = stack.enter_context(running("serve", str(folders[0]), "--name", "elastic", *serve))
        plain = stack.enter_context(running("serve", str(folders[1]), "--name", "plain", *serve))
        upstreams = [
            {"name": "small", "url": elastic.url, "quality": 0.9, "cost": 1.0},
            {"name": "large", "url": plain.url, "levels": ["full"], "cost": 2.0},
            {"name": "dead", "url": nowhere(), "cost": 0.1},
        ]
        pool = tmp_path / "pool.yaml"
        pool.write_text(yaml.safe_dump({"upstreams": upstreams, "bounds": {"probe_seconds": 0.2}}))
        router = stack.enter_context(running("route", str(pool)))

        def ask(**fields):
            body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, **fields}
            return httpx2.post(router.url + "/v1/completions", json=body, timeout=120)

        def went(**fields):
            answer = ask(**fields)
            assert answer.status_code == 200, answer.text
            served = answer.json()["moe_prism"]
            return answer.headers["x-moe-prism-upstream"], served["point"], answer.json()["model"]

        assert went() == ("small@low", "low", "elastic")
        assert went(quality=0.8) == ("small@half", "half", "elastic")
        assert went(min_quality=0.85) == ("small@full", "full", "elastic")
        assert went(quality=1.0) == ("large@full", "full", "plain")
        assert went(model="large@full")[0] == "large@full"
        assert ask(quality=1.0, model="small").status_code == 400
        assert ask(nonsense=1).json()["error"]["code"] == "unknown_field"  # the upstream's own words
        direct = httpx2.post(
            plain.url + "/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "temperature": 0}, timeout=120
        )
        assert ask(quality=1.0).json()["choices"] == direct.json()["choices"]
        body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True, "min_quality": 0.7}
        with httpx2.stream("POST", router.url + "/v1/completions", json=body, timeout=120) as response:
            events = [line for line in response.iter_lines() if line]
        assert response.headers["x-moe-prism-upstream"] == "small@low"
        assert events[-1] == "data: [DONE]" and all(json.loads(e.removeprefix("data: "))["choices"] for e in events[:-1])
        names = [each["id"] for each in httpx2.get(router.url + "/v1/models").json()["data"]]
        assert {"pool", "small", "large", "dead", "small@half", "large@full"} <= {*names}

        elastic.child.kill()
        elastic.child.wait()
        assert went() == ("large@full", "full", "plain")  # at once, whether its death was seen or not
        plain.child.kill()
        plain.child.wait()
        lost = ask()
        assert lost.status_code == 503 and lost.json()["error"]["code"] == "upstreams" and "retry-after" in lost.headers
        assert router.end() == 0
        assert PROMPT not in "".join(router.log)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    from moe_prism import cli

    path = tmp_path / "pool.yaml"
    path.write_text("upstreams: [{name: a, url: 'http://127.0.0.1:1', costs: 2}]\n")
    assert cli.main(["route", str(path)]) == 2
    assert "an upstream has no 'costs'; did you mean 'cost'?" in capsys.readouterr().err
    assert cli.main(["route", str(path), "--measure", "q.jsonl"]) == 2
    assert "--measure and --out go together" in capsys.readouterr().err
    for words, said in (
        (["--tokens", "3"], "--tokens belongs to --measure"),
        (["--json"], "--json belongs to --measure"),
        (["--measure", "q", "--out", "r", "--port", "3"], "--port does not go with --measure"),
    ):
        assert cli.main(["route", str(path), *words]) == 2
        assert said in capsys.readouterr().err
    path.write_text("upstreams: [{name: a, url: 'http://127.0.0.1:1'}]\n")
    assert cli.main(["route", str(path), "--host", "0.0.0.0"]) == 2
    assert "needs a key" in capsys.readouterr().err

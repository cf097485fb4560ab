"""Two replicas of the server behind Ray Serve, asked through it. Skipped where Ray is missing: pip install 'ray[serve]'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'ray[serve]'")
pytestmark = pytest.mark.slow

START = """
import signal, sys, time
import ray
from ray import serve

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from deploy.ray.app import app

serve.run(app, name="moe-prism")
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def url(tiny_levels):
    port = 18000 + os.getpid() % 2000
    environment = {
        **os.environ,
        "MODEL": str(tiny_levels),
        "MOE_PRISM_ARGUMENTS": "--probe-seconds 0.05 --name tiny",
        "MOE_PRISM_API_KEY": "secret",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", START, str(port)], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        until = time.monotonic() + 240
        while child.stdout.readline().strip() != "ready":
            assert child.poll() is None and time.monotonic() < until
        yield f"http://127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(120)
        child.stdout.close()


BODY = {"prompt": "def main(", "max_tokens": 3, "temperature": 0, "quality": 0.9}
KEY = {"authorization": "Bearer secret", "x-request-id": "mine"}


def test_two_replicas_answer_alike(url):
    with httpx2.Client(base_url=url, headers=KEY, timeout=60) as web:
        answers = [web.post("/v1/completions", json=BODY) for _ in range(24)]
        assert {a.status_code for a in answers} == {200} and {a.headers["x-request-id"] for a in answers} == {"mine"}
        said = [a.json() for a in answers]
        assert len({a["system_fingerprint"] for a in said}) == 2, "a fingerprint is a server's own"
        assert len({a["choices"][0]["text"] for a in said}) == 1
        assert {a["moe_prism"]["quality"] for a in said} == {0.9}


def test_streams_keys_and_refusals_go_through(url):
    with httpx2.Client(base_url=url, headers=KEY, timeout=60) as web:
        with web.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[0].removeprefix("data: "))["choices"]
        assert web.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert web.post("/v1/completions", json={**BODY, "quality": "nonsense"}).status_code == 400
    assert httpx2.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 401

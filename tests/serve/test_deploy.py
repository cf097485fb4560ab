"""The files of `deploy/` say what the server understands. No container engine is asked."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
import yaml

from moe_prism.cli import build
from moe_prism.serve.config import Config, read_config
from moe_prism.serve.http.metrics import Metrics

from .test_status import LADDER

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def documents(name):
    return [d for d in yaml.safe_load_all((DEPLOY / name).read_text()) if d]


def paths(thing):
    """Every `path` of a manifest."""
    if isinstance(thing, dict):
        yield from ([thing["path"]] if isinstance(thing.get("path"), str) else [])
        thing = list(thing.values())
    if isinstance(thing, list):
        for each in thing:
            yield from paths(each)


def test_the_container_runs_a_command_that_there_is():
    text = (DEPLOY / "Containerfile").read_text()
    words = json.loads(re.search(r"^CMD (.*)$", text, re.M)[1])
    build().parse_args(words, exit_on_error=False, print_error=False)
    assert "STOPSIGNAL SIGTERM" in text and "USER 10001" in text
    for source in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in shlex.split(source))


def test_the_configuration_is_understood_and_pods_live_long_enough_for_it():
    config = read_config(documents("kubernetes/qos.yaml")[0])
    assert isinstance(config, Config) and config.bounds.drain_delay >= 10
    deployment, service = documents("kubernetes/server.yaml")
    pod = deployment["spec"]["template"]["spec"]
    grace = re.sub(r"s$", "", documents("compose.yaml")[0]["services"]["server"]["stop_grace_period"])
    assert min(pod["terminationGracePeriodSeconds"], int(grace)) > config.bounds.drain_delay + config.bounds.drain_seconds
    container = pod["containers"][0]
    assert set(paths([container["startupProbe"], container["livenessProbe"]])) == {"/health"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < config.bounds.drain_delay


def test_kserve_runs_a_command_that_there_is_and_asks_what_is_answered():
    [service] = documents("kubernetes/kserve.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = service["spec"]["predictor"]
    [container] = predictor["containers"]
    assert container["name"] == "kserve-container", "the name that KServe looks for"
    build().parse_args(container["args"], exit_on_error=False, print_error=False)
    port = int(container["args"][container["args"].index("--port") + 1])
    assert container["ports"][0]["containerPort"] == port
    probes = [container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [(p["path"], p["port"]) for p in probes] == [("/health", port), ("/health", port), ("/ready", port)]
    assert predictor["terminationGracePeriodSeconds"] > Config().bounds.drain_seconds
    mounts, volumes = ({v["name"] for v in found} for found in (container["volumeMounts"], predictor["volumes"]))
    assert mounts == volumes
    pod = documents("kubernetes/server.yaml")[0]["spec"]["template"]["spec"]
    assert container["env"] == pod["containers"][0]["env"] and container["image"] == pod["containers"][0]["image"]


@pytest.mark.slow
def test_what_compose_would_start_answers(tiny_levels, tmp_path):
    """The container's command on this machine, with its key; then its health check, and what Prometheus would ask."""
    compose = documents("compose.yaml")[0]
    words = json.loads(re.search(r"^CMD (.*)$", (DEPLOY / "Containerfile").read_text(), re.M)[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"/model": str(tiny_levels), "/etc/moe-prism/qos.yaml": str(DEPLOY / "kubernetes/qos.yaml"), "8000": str(port)}
    command = [sys.executable, "-m", "moe_prism", *(there.get(w, w) for w in words), "--probe-seconds", "0.05"]
    environment = {**os.environ, "MOE_PRISM_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = (json.loads(line) for line in child.stderr if line.startswith("{"))
        assert next(line for line in lines if line["event"] == "ready")["policy"]
        said = threading.Thread(target=child.stderr.read, daemon=True)
        said.start()
        _, python, flag, code = compose["services"]["server"]["healthcheck"]["test"]
        assert (python, flag) == ("python", "-c")
        subprocess.run([sys.executable, "-c", code.replace("8000", str(port))], check=True, timeout=60)
        scrape = yaml.safe_load(compose["configs"]["scrape"]["content"])["scrape_configs"][0]
        assert scrape["static_configs"][0]["targets"] == ["server:8000"] and "credentials_file" in scrape["authorization"]
        key = {"authorization": "Bearer secret"}
        assert httpx2.get(f"http://127.0.0.1:{port}/metrics").status_code == 401
        text = httpx2.get(f"http://127.0.0.1:{port}/metrics", headers=key).text
        body = {"prompt": "a", "max_tokens": 2}
        assert httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=key, timeout=60).status_code == 200
        drawn = json.loads((ROOT / "docs/grafana.json").read_text())
        wanted = set(re.findall(r"moe_prism:\w+", json.dumps(drawn)))
        assert wanted and all(name in text for name in wanted), "Grafana draws what is there"
    finally:
        child.terminate()
        assert child.wait(60) == 0
        child.stderr.close()


def test_files_that_the_files_name_exist():
    services = documents("compose.yaml")[0]["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith("${") or (DEPLOY / source).is_file(), source
    kustomization = documents("kubernetes/kustomization.yaml")[0]
    named = [*kustomization["resources"], *kustomization["configMapGenerator"][0]["files"]]
    assert all((DEPLOY / "kubernetes" / name).is_file() for name in named)


def test_autoscaling_asks_for_a_metric_that_there_is():
    wanted = documents("kubernetes/autoscaling.yaml")[0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert re.search(rf"^{wanted}{{", Metrics("m", ["standard"], LADDER).text().decode(), re.M)

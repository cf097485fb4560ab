"""The files of `deploy/` say what the server understands. No container engine is asked."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

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

"""`moe-prism serve` in processes of their own, one per policy, all alike but for that."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import PrismError, UsageError
from ..schedule.classes import RequestClass
from ..serve.config import Config

START = 600.0  # seconds a server may take to load and to measure
UNBOUNDED = 65_536  # requests that may wait: refusals are the door's, and here policies are compared


@dataclass(frozen=True)
class PolicyChoice:
    """A policy with options, written `name` or `name:option=value:option=value`."""

    label: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> PolicyChoice:
        """UsageError if an option is not option=value."""
        name, *rest = text.split(":")
        options: dict[str, Any] = {}
        for item in rest:
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise UsageError(f"'{item}' in --policies is not option=value", "write elastic:quality=0.95")
            try:
                options[key] = json.loads(value)
            except ValueError:
                options[key] = value
        return cls(text, name, options)


def settings(config: Config, classes: Mapping[str, RequestClass], policy: PolicyChoice) -> dict[str, Any]:
    """qos.yaml for one policy: the given one without bounds on the queue."""
    return {
        "classes": {name: _fields(kind) for name, kind in classes.items()},
        "default_class": config.default_class,
        "policy": policy.name,
        "policy_options": policy.options,
        "engine": config.engine.model_dump(),
        "bounds": {"queue_requests": UNBOUNDED, "queue_tokens": 1 << 28, "connections": UNBOUNDED, "request_seconds": 86_400},
    }


def _fields(kind: RequestClass) -> dict[str, Any]:
    fields = asdict(kind)
    fields.pop("name")
    times = {f"{key}_ms": fields.pop(key) for key in ("ttft", "tpot")}
    return {**fields, **{key: 1000 * seconds for key, seconds in times.items() if seconds is not None}}


@dataclass
class ServerProcess:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str


@contextlib.contextmanager
def serving(
    folder: Path, settings: dict[str, Any], arguments: Sequence[str], scratch: Path, name: str
) -> Iterator[ServerProcess]:
    """Start, wait until ready, and stop at the end. PrismError with the server's own words if it does not come up."""
    scratch.mkdir(parents=True, exist_ok=True)
    config, log = scratch / f"{name}.json", scratch / f"{name}.log"
    config.write_text(json.dumps(settings))
    start = "from moe_prism.cli import entry; entry()"
    command = [sys.executable, "-c", start, "serve", str(folder), "--port", "0", "--config", str(config), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_environment())  # noqa: S603
    _behind_us(process.pid)
    try:
        yield ServerProcess(process, _ready(process, log))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _behind_us(pid: int) -> None:
    """The server lets the load generator go first where they share a core: a late generator makes a run void."""
    with contextlib.suppress(AttributeError, OSError):  # not POSIX, or not allowed
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0) + 5)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "MOE_PRISM_API_KEY"}


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address, once the log says so."""
    until = time.monotonic() + START
    while time.monotonic() < until:
        lines = log.read_text(errors="replace").splitlines()
        for line in lines:
            if '"event": "ready"' in line:
                return str(json.loads(line)["url"])
        if process.poll() is not None:
            said = lines[-1] if lines else f"exit code {process.returncode}"
            raise PrismError(said.removeprefix("moe-prism: error: "), "the server did not start")
        time.sleep(0.1)
    raise PrismError(f"the server was not ready within {START:g} s", f"see {log}")

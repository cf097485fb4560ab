"""`moe-prism serve OUT --engine vllm`: hand the process over to vLLM's own server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ...artefact.load import whole_manifest
from ...errors import UsageError
from ...options.serve import ServeOptions
from ..keys import keep_private
from ..server import check_host
from . import compat
from .levels import SECTION, Menu, is_elastic

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
GIB = "4"
"""GiB of key/value cache unless the variable says otherwise: vLLM's own default is nine tenths of the machine, and it refuses to start
when less is free."""


def command(folder: Path, options: ServeOptions) -> list[str]:
    """vLLM's server, started without its `vllm` program: that one fails where only the distribution vllm-cpu is installed."""
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    chosen = ["--additional-config", json.dumps({SECTION: {"points": list(options.points)}})] if options.points else []
    place = ["--host", options.host, "--port", str(options.port)]
    return [*program, *chosen, "--model", str(folder), "--served-model-name", options.name or folder.resolve().name, *place]


def launch(folder: Path, options: ServeOptions) -> None:
    """Does not return. UsageError if vLLM is missing or of an unknown version, or the folder is not elastic."""
    problem = compat.problem()
    if problem:
        raise UsageError(problem.split("; ")[0], "see docs/how-to/vllm.md")
    if not is_elastic(folder):
        raise UsageError(f"'{folder}' is not an elastic model", "give the folder written by `moe-prism refactor`")
    whole_manifest(folder, every=options.verify)
    Menu.of(folder, {"points": list(options.points)})  # a point that vLLM cannot run is told before it starts
    keep_private()
    allowed = check_host(options)
    if len(allowed) > 1:
        raise UsageError("vLLM is started with one key", "leave one in the file")
    environment = {KV_SPACE: GIB, **os.environ, **({"VLLM_API_KEY": allowed[0]} if allowed else {})}
    os.execve(sys.executable, command(folder, options), environment)  # noqa: S606 - our own interpreter, no shell

"""`moe-prism serve`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from .experts import Experts


def serve(
    folder: Path,
    /,
    *,
    engine: Literal["embedded", "vllm"] = "embedded",
    policy: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    config: Path | None = None,
    api_key: str | None = None,
    name: str | None = None,
    cost: Path | None = None,
    save_cost: Path | None = None,
    probe_seconds: float = 4.0,
    experts: Experts = Experts(),  # noqa: B008 - frozen
    debug: bool = False,
) -> None:
    """Serve an elastic model with an OpenAI-compatible API, every request at its own operating point.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`; after `moe-prism frontier --compare threshold` it has more operating points.
    engine: embedded, or vllm: hand over to vLLM's own server (docs/vllm.md), which takes --host, --port, --api-key and --name only.
    policy: Scheduling policy; see `moe-prism ls policies`. Default elastic.
    host: Address to listen on. Anything but loopback needs a key.
    port: Port to listen on; 0 for any free one.
    config: qos.yaml with request classes, limits and policy options.
    api_key: Key that every route but /health asks for; default: the variable MOE_PRISM_API_KEY.
    name: Model name in answers; default: the folder's.
    cost: Cost model to load instead of measuring one.
    save_cost: Where to save the cost model: when it is measured, and again at the end with what was learned.
    probe_seconds: Seconds to measure the cost model.
    debug: Plain logs with stack traces.
    """
    from ..serve import logs
    from ..serve.options import ServeOptions
    from ..serve.server import serve as run

    if not 0 < probe_seconds <= 600:
        raise UsageError(f"--probe-seconds {probe_seconds:g} is out of range", "give more than 0 and at most 600")
    key = api_key or os.environ.get("MOE_PRISM_API_KEY") or None
    if engine == "vllm":
        given = {"--policy": policy, "--config": config, "--cost": cost, "--save-cost": save_cost}
        given["--expert-memory"] = experts.expert_memory
        wrong = next((option for option, value in given.items() if value is not None), None)
        if wrong:
            raise UsageError(f"{wrong} is not available with --engine vllm", "leave it out; vLLM schedules by itself")
        from ..serve.vllm.launch import launch

        return launch(folder, host, port, name, key)
    logs.set_up(debug)
    return run(
        folder, ServeOptions(host, port, policy, config, key, name, cost, save_cost, probe_seconds, experts.options(), debug)
    )

"""`moe-prism serve`"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import UsageError
from .experts import Experts


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where it listens."""

    host: Annotated[str, Parameter(help="Address to listen on. Anything but loopback needs a key.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port to listen on; 0 for any free one.")] = 8000
    api_key: Annotated[
        str | None, Parameter(help="Key that every route but /health asks for; default: the variable MOE_PRISM_API_KEY.")
    ] = None
    name: Annotated[str | None, Parameter(help="Model name in answers; default: the folder's.")] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Serving:
    """How requests are served."""

    points: Annotated[
        str | None,
        Parameter(
            help="Comma-separated names of measured operating points to serve, or another frontier.json; "
            "default: the best of all that can share a batch."
        ),
    ] = None
    policy: Annotated[str | None, Parameter(help="Scheduling policy; see `moe-prism ls policies`. Default elastic.")] = None
    config: Annotated[Path | None, Parameter(help="qos.yaml with request classes, limits and policy options.")] = None
    cost: Annotated[Path | None, Parameter(help="Cost model to load instead of measuring one.")] = None
    save_cost: Annotated[
        Path | None,
        Parameter(help="Where to save the cost model: when it is measured, and again at the end with what was learned."),
    ] = None
    probe_seconds: Annotated[float, Parameter(help="Seconds to measure the cost model.")] = 4.0
    debug: Annotated[bool, Parameter(help="Plain logs with stack traces.")] = False


def serve(
    folder: Path,
    /,
    *,
    engine: Literal["embedded", "vllm"] = "embedded",
    listening: Listening = Listening(),
    serving: Serving = Serving(),
    experts: Experts = Experts(),  # noqa: B008 - frozen
) -> None:
    """Serve an elastic model with an OpenAI-compatible API, every request at its own operating point.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`; after `moe-prism frontier --methods all-per-token` it has more operating points.
    engine: embedded, or vllm: hand over to vLLM's own server, which takes --host, --port, --api-key, --name and --points only.
    """
    from ..serve import logs
    from ..serve.options import ServeOptions
    from ..serve.server import serve as run

    if not 0 < serving.probe_seconds <= 600:
        raise UsageError(f"--probe-seconds {serving.probe_seconds:g} is out of range", "give more than 0 and at most 600")
    key = listening.api_key or os.environ.get("MOE_PRISM_API_KEY") or None
    points = tuple(serving.points.split(",")) if serving.points else ()
    if engine == "vllm":
        given = {f"--{name.replace('_', '-')}": getattr(serving, name) for name in ("policy", "config", "cost", "save_cost")}
        given["--expert-memory"] = experts.expert_memory
        wrong = next((option for option, value in given.items() if value is not None), None)
        if wrong:
            raise UsageError(f"{wrong} is not available with --engine vllm", "leave it out; vLLM schedules by itself")
        from ..serve.vllm.launch import launch

        return launch(folder, listening.host, listening.port, name=listening.name, api_key=key, points=points)
    logs.set_up(serving.debug)
    options = ServeOptions(
        host=listening.host,
        port=listening.port,
        policy=serving.policy,
        config=serving.config,
        api_key=key,
        name=listening.name,
        cost=serving.cost,
        save_cost=serving.save_cost,
        probe_seconds=serving.probe_seconds,
        store=experts.options(),
        points=points,
        debug=serving.debug,
    )
    return run(folder, options)

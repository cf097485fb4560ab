"""`moe-prism serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from ..options.experts import ExpertOptions
from ..options.serve import ServeOptions
from .experts import store_options


def serve(
    folder: Path,
    /,
    *,
    engine: Literal["embedded", "vllm"] = "embedded",
    options: ServeOptions,
    experts: ExpertOptions,
) -> None:
    """Serve a model with an OpenAI-compatible API, every request at its own operating point.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, after which `moe-prism frontier --methods all-per-token` gives it more operating points; or
        any folder that transformers loads, plain or pruned, whose points are fewer experts per token.
    engine: embedded, or vllm: hand over to vLLM's own server, which takes --host, --port, keys, --name, --points and --verify only.
    """
    if engine == "vllm":
        given = {
            f"--{name.replace('_', '-')}": getattr(options, name)
            for name in (
                "policy",
                "config",
                "cost",
                "save_cost",
                "bytes_per_token",
                "patterns",
                "adapter_folder",
                "self_draft",
                "trace_out",
                "otlp_traces_endpoint",
            )
        }
        given["--adapter"] = options.adapters or None
        given |= {"--expert-memory": experts.expert_memory, "--allowed-origins": options.allowed_origins or None}
        wrong = next((option for option, value in given.items() if value is not None), None)
        if wrong:
            raise UsageError(f"{wrong} is not available with --engine vllm", "leave it out; vLLM schedules by itself")
        experts.check_used()
        from ..serve.vllm.launch import launch

        return launch(folder, options)
    options = replace(options, store=store_options(experts))
    from ..model.named import SHIPPED
    from ..serve import logs
    from ..serve.server import serve_model

    logs.set_up(options.debug)
    return serve_model(SHIPPED.get(str(folder), folder), options)

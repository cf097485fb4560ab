"""`moe-prism trace`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .output import emit, note, progress


def trace(
    model: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    text: str = "stdlib",
    tokens: int = 8192,
    length: int = 256,
    prompt: int = 64,
    budget: float = 1.0,
    rule: str | None = None,
    inputs: bool = False,
    values: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Record which experts and sub-experts every token of some text uses: what caches and predictors are replayed on.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a folder written by `moe-prism refactor`, a hub name, or 'nano'.
    out: The .npz file to write.
    text: stdlib, topics, a file, a folder, a .jsonl file or a saved dataset. Both of its sides are recorded, and marked.
    tokens: Tokens in all.
    length: Tokens per request.
    prompt: How many of them are the prefill step; the others are one decode step each.
    budget: Kept slots / all slots of an elastic model, in (0, 1].
    rule: Selection rule of an elastic model; see `moe-prism ls rules`. Default threshold.
    inputs: Also keep the routers' inputs and weights, which cross-layer prediction needs.
    values: Also keep the value of every candidate slot of an elastic model.
    force: Replace an existing file.
    json: One JSON object on stdout.
    """
    from ..files import check_writable
    from ..jobs.trace import TraceOptions, record_trace

    check_writable(out)
    options = TraceOptions(text, tokens, length, prompt, budget, rule, inputs, values)
    found = record_trace(model, out, options, force=force, report=progress)
    facts: dict[str, Any] = {
        "file": str(out),
        "bytes": out.stat().st_size,
        "tokens": len(found),
        "requests": int(found.request.max()) + 1,
        "layers": found.layers,
        "experts": found.experts,
        "k": found.k,
        "n_sub": found.n_sub,
        "slots_per_token": float(found.slots().mean()),
    }
    note(f"next: moe-prism inspect {model} --routing --trace {out}")
    emit(
        facts,
        f"{out}: {facts['tokens']} tokens of {facts['requests']} requests, {facts['layers']} layers, "
        f"{facts['slots_per_token']:.2f} of {found.k * found.n_sub} slots per token, {facts['bytes'] / 1024:.0f} KiB",
        json,
    )

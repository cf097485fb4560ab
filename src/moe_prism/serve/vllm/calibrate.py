"""`moe-prism calibrate --engine vllm`: the pass in vLLM, for models that only it can hold; the folder is that of any calibration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import load

from ...artefact.output import Writing, check_apart, finished
from ...artefact.source import Weights
from ...calibrate.options import settings
from ...calibrate.run import Batch, Pass, batches, profile_windows
from ...calibrate.statistics import Statistics
from ...checkpoint import OutputFolder, source_facts
from ...data import Windows
from ...errors import CorruptError, UsageError
from ...jobs.calibrate import calibration_windows, pass_facts, read_statistics, write_statistics
from ...jobs.which_text import with_text
from ...model import resolve
from ...model.place import compute_type, recorded
from ...options.calibrate import CalibrateOptions
from ...progress import silent
from . import compat
from .collect import DECODER, EXTENSION
from .launch import GIB, KV_SPACE

COLLECTORS = ("counts", "tokens", "inputs")
"""Those that need what experts are called with, and nothing of their weights or of the router."""
OWN = (
    "model", "worker_extension_cls", "enforce_eager", "enable_prefix_caching", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
)  # fmt: skip
"""Arguments of vLLM that are not the user's here."""


def calibrate_with_vllm(
    model: str | Path,
    out: str | Path,
    options: CalibrateOptions | None = None,
    engine: Mapping[str, Any] | None = None,
    **how: Unpack[Writing],
) -> Statistics:
    """What `calibrate_model` writes, from a pass inside vLLM. engine: arguments of its `LLM`, such as tensor_parallel_size.

    A window is a request of one token, alone in its step. vLLM starts processes that import the script again: import and call this below
    `if __name__ == "__main__"`. Raises UsageError for what vLLM cannot gather, before it starts.
    """
    options, resume = options or CalibrateOptions(), how.get("resume", False)
    options.check()
    given = dict(engine or {})
    _check(options, given)
    where = resolve(model)
    options = with_text(options, where)
    check_apart(where, out)
    inputs = {"source": source_facts(where), "options": recorded(options)}
    if resume and finished(out, {"kind": "calibration", **inputs}):
        return read_statistics(out)
    weights, windows = Weights(where), calibration_windows(where, options)
    work = Pass(weights.model, weights.layers, settings(options))
    with (
        OutputFolder(out, resume=resume, force=how.get("force", False)) as folder,
        how.get("report", silent)("calibrate") as update,
    ):
        llm = _start(where, windows, given)
        try:
            _begin(llm, work, windows, options)
            for batch in batches(windows.ids, 1, windows.parts):
                _run(llm, batch, windows.ids.shape[1])
                update(batch.first + 1, len(windows.ids))
            _told(llm, "moe_prism_window", -1, "")
            _take(llm, work)
        finally:
            llm.llm_engine.engine_core.shutdown()
        work.done, work.profile = len(windows.ids), profile_windows(windows.ids)
        found = work.statistics(pass_facts(work, windows))
        for i, layer in enumerate(found.layers):
            layer.check(f"layer {i} from vLLM", work.capacity, {})
        write_statistics(folder, found, inputs)
    return found


def _check(options: CalibrateOptions, engine: Mapping[str, Any]) -> None:
    """UsageError for what the pass in vLLM has not."""
    problem = compat.problem()
    if problem:
        raise UsageError(problem.split("; ")[0], "see docs/how-to/vllm.md")
    wrong = next((name for name in options.collectors if name not in COLLECTORS), None)
    if wrong:
        raise UsageError(f"vLLM does not show what the collector '{wrong}' needs", f"choose from: {', '.join(COLLECTORS)}")
    if options.low_memory or options.tasks:
        raise UsageError("--low-memory and --tasks belong to the pass in transformers", "leave them out with --engine vllm")
    own = next((name for name in OWN if name in engine), None)
    if own:
        raise UsageError(f"'{own}' of vLLM is set here", "leave it out of --engine-options")
    if int(engine.get("data_parallel_size", 1)) > 1:
        raise UsageError(
            "with data parallelism a window's tokens are in several workers", "use tensor, expert or pipeline parallelism"
        )


def _start(where: Path, windows: Windows, engine: dict[str, Any]) -> Any:
    """vLLM, for one window at a time and with none of it kept."""
    os.environ.setdefault(KV_SPACE, GIB)
    length = windows.ids.shape[1]
    asked = compute_type()
    stored = asked if isinstance(asked, str) else str(asked or torch.float32).removeprefix("torch.")
    make = compat.name("LLM")
    return make(
        **{"dtype": stored, "tokenizer": str(where), "skip_tokenizer_init": True, **engine},
        model=str(where),
        worker_extension_cls=EXTENSION,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=1,
        max_num_batched_tokens=max(length + 1, 512),
        max_model_len=length + 1,
    )


def _begin(llm: Any, work: Pass, windows: Windows, options: CalibrateOptions) -> None:
    """Tell the workers what to gather. UsageError where some layer is in none of them."""
    layers: dict[str, dict[str, Any]] = {}
    for layer in work.layers:
        place = DECODER.search(layer.name)
        if place is None:
            raise UsageError(f"'{layer.name}' has no number that vLLM would know it by", "calibrate without --engine")
        facts = {"index": layer.index, "name": layer.name, "num_experts": layer.num_experts}
        layers[place[1]] = {**facts, "hidden": layer.hidden, "width": layer.width}
    said = {
        "layers": layers,
        "keys": work.settings.gathered(),
        "capacity": work.capacity,
        "seed": options.seed,
        "length": windows.ids.shape[1],
    }
    found = {number for own in llm.collective_rpc("moe_prism_begin", args=(json.dumps(said),)) for number in own}
    missing = [layer.name for layer in work.layers if layer.index not in found]
    if missing:
        raise UsageError(f"vLLM runs no experts for '{missing[0]}'", "calibrate without --engine")


def _run(llm: Any, batch: Batch, length: int) -> None:
    _told(llm, "moe_prism_window", batch.first * length, batch.domain)
    params = compat.name("SamplingParams")(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate([{"prompt_token_ids": batch.ids[0].tolist()}], params, use_tqdm=False)


def _told(llm: Any, method: str, *arguments: Any) -> None:
    """CorruptError where a layer has not seen the window before."""
    missed = [number for own in llm.collective_rpc(method, args=arguments) for number in own]
    if missed:
        raise CorruptError(f"MoE layer {missed[0]} saw nothing of a window", "calibrate without --engine")


def _take(llm: Any, work: Pass) -> None:
    """The workers' statistics, a layer at a time."""
    for layer, mine in zip(work.layers, work.collectors, strict=True):
        found = next((data for data in llm.collective_rpc("moe_prism_statistics", args=(layer.index,)) if data), None)
        if found is None:
            raise CorruptError(f"no worker of vLLM has statistics of '{layer.name}'", "calibrate without --engine")
        tensors = load(found)
        for key, collector in mine.items():
            collector.load({name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")})

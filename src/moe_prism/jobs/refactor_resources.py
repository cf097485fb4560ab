"""What a job will need, before it starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..artefact.source import Weights
from ..calibrate.options import settings
from ..calibrate.run import bounded_capacity, declared_bytes
from ..errors import DoesNotFit
from ..model import resolve
from ..options.refactor import RefactorOptions
from .align import align
from .distance import LOGITS
from .refactor import check_width

PROCESS_BYTES = 700 << 20  # Python with torch, transformers and numba loaded
FLOAT32 = 4


def resources_of(model: str | Path, options: RefactorOptions) -> dict[str, Any]:
    """Declared peak memory and disk of `refactor`, in bytes, by part. UsageError for options that the model does not allow."""
    options.check()
    weights = Weights(resolve(model), options.dtype, options.keep)
    options = align(weights, options).options
    for each in weights.layers:
        check_width(each, options)
    calibration = options.calibration
    run = settings(calibration)
    capacity = bounded_capacity(weights.layers, run)
    declared = declared_bytes(weights.layers, run, capacity)
    layer = max(weights.layers, key=lambda x: x.num_experts * x.parameters_per_expert())
    experts = layer.num_experts * layer.parameters_per_expert() * FLOAT32
    everything = sum(p.numel() for p in weights.model.parameters()) * FLOAT32
    config: Any = weights.model.config.get_text_config()
    tokens = min(calibration.tokens, run.batch * calibration.length)
    parts = {
        "process_bytes": PROCESS_BYTES,
        "weights_bytes": 3 * experts if calibration.low_memory else everything + experts,
        "statistics_bytes": 2 * declared,
        "activations_bytes": tokens * _row_bytes(weights, layer.hidden, layer.width, calibration.length),
        "logits_bytes": max(
            0 if calibration.low_memory else 6 * calibration.length * config.vocab_size * FLOAT32,
            3 * max(LOGITS, calibration.length * config.vocab_size) * FLOAT32 if options.keep else 0,
        ),
        "solver_bytes": 4 * layer.num_experts * capacity * layer.width * FLOAT32,
    }
    written = weights.written_bytes or everything // 2
    disk = written + 2 * declared  # a new snapshot of the statistics is complete before the one before it goes
    return {"peak_memory_bytes": sum(parts.values()), "disk_bytes": disk, **parts, "reservoir_tokens": capacity}


def _row_bytes(weights: Weights, hidden: int, width: int, length: int) -> int:
    """Live activations per token of one decoder layer: about 16 hidden vectors, the chosen experts' neurons, attention scores."""
    config: Any = weights.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    return FLOAT32 * (16 * hidden + 4 * 8 * width + 2 * heads * length)


def check_resources(needed: dict[str, Any], out: str | Path) -> None:
    """DoesNotFit if this machine has less memory, or the disk of `out` less space, than is needed."""
    memory = available_memory()
    if needed["peak_memory_bytes"] > memory:
        raise DoesNotFit(
            f"this needs {_size(needed['peak_memory_bytes'])} of memory, {_size(memory)} are free",
            "use --low-memory, a smaller --reservoir, or a larger machine",
        )
    there = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed["disk_bytes"] > free:
        raise DoesNotFit(
            f"this needs {_size(needed['disk_bytes'])} of disk, {_size(free)} are free at '{out}'",
            "free some, or choose another --out",
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def available_memory() -> int:
    """Bytes the system could give a new process now."""
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

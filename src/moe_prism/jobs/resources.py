"""What a job will need, before it starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..artefact.source import Weights
from ..calibrate.options import settings
from ..calibrate.run import bounded_capacity, declared_bytes
from ..errors import DoesNotFit, UsageError
from ..model import MoELayer, resolve
from ..options.calibrate import CalibrateOptions
from ..options.refactor import RefactorOptions
from ..partition.base import check_blocks
from .align import align
from .distance import LOGITS

PROCESS_BYTES = 880 << 20  # Python with torch, transformers and numba loaded, as RLIMIT_DATA counts; 750 MiB of it are resident
FLOAT32 = 4


def resources_of(model: str | Path, options: RefactorOptions) -> dict[str, Any]:
    """Declared peak memory and disk of `refactor`, in bytes, by part. UsageError for options that the model does not allow."""
    options.check()
    weights = Weights(resolve(model), options.dtype, options.keep)
    options = align(weights, options).options
    for each in weights.layers:
        check_width(each, options)
    return needed_by(weights, options)


def needed_by(weights: Weights, options: RefactorOptions) -> dict[str, Any]:
    """The same of a source that is open, for options that fit it."""
    parts, declared, capacity = pass_parts(weights, options.calibration)
    layer, length, vocabulary = largest_layer(weights), options.calibration.length, text_config(weights).vocab_size
    if options.keep:
        parts["logits_bytes"] = max(parts["logits_bytes"], 3 * max(LOGITS, length * vocabulary) * FLOAT32)
    parts["solver_bytes"] = 4 * layer.num_experts * capacity * layer.width * FLOAT32
    # a new snapshot of the statistics is complete before the one before it goes
    return told(parts, written_bytes(weights) + 2 * declared) | {"reservoir_tokens": capacity}


def needed_by_pass(weights: Weights, options: CalibrateOptions, written: int = 0) -> dict[str, Any]:
    """What a calibration needs, and so many bytes of disk beside it."""
    parts, declared, _ = pass_parts(weights, options)
    return told(parts, 2 * declared + written)


def needed_on_disk(written: int) -> dict[str, Any]:
    """Where memory is not what can be short."""
    return told({}, written)


def told(parts: dict[str, int], disk: int) -> dict[str, Any]:
    """As `--dry-run` shows it."""
    return {"peak_memory_bytes": sum(parts.values()), "disk_bytes": disk, **parts}


def written_bytes(weights: Weights) -> int:
    """Of the checkpoint that is written; of a GGUF file two per weight."""
    return weights.written_bytes or sum(p.numel() for p in weights.model.parameters()) * FLOAT32 // 2


def largest_layer(weights: Weights) -> MoELayer:
    """The largest layer."""
    return max(weights.layers, key=lambda x: x.num_experts * x.parameters_per_expert())


def text_config(weights: Weights) -> Any:
    """The configuration of the part that reads text."""
    return weights.model.config.get_text_config()


def pass_parts(weights: Weights, calibration: CalibrateOptions) -> tuple[dict[str, int], int, int]:
    """(memory of the pass by part, bytes that its collectors hold, tokens per expert)."""
    run = settings(calibration)
    capacity = bounded_capacity(weights.layers, run)
    declared, layer = declared_bytes(weights.layers, run, capacity), largest_layer(weights)
    experts = layer.num_experts * layer.parameters_per_expert() * FLOAT32
    everything = sum(p.numel() for p in weights.model.parameters()) * FLOAT32
    tokens = min(calibration.tokens, run.batch * calibration.length)
    parts = {
        "process_bytes": PROCESS_BYTES,
        "weights_bytes": 3 * experts if calibration.low_memory else everything + experts,
        "statistics_bytes": 2 * declared,
        "activations_bytes": tokens * _row_bytes(weights, layer.hidden, layer.width, calibration.length),
        "logits_bytes": 0 if calibration.low_memory else 6 * calibration.length * text_config(weights).vocab_size * FLOAT32,
    }
    return parts, declared, capacity


def check_width(layer: MoELayer, options: RefactorOptions) -> None:
    """UsageError for sub-experts, gate neurons or a rank that the layer's shape does not allow."""
    check_blocks(layer.width, options.n_sub, f"'{layer.name}'")
    if options.compensate == "low-rank" and options.rank > layer.hidden:
        raise UsageError(f"--rank {options.rank} is more than the hidden size {layer.hidden}", "give a small number, like 2")
    if not 0 <= options.gates <= layer.width // options.n_sub:
        raise UsageError(
            f"--gates {options.gates} is outside 0..{layer.width // options.n_sub}", "a block has no more neurons than that"
        )


def _row_bytes(weights: Weights, hidden: int, width: int, length: int) -> int:
    """Live activations per token of one decoder layer: about 16 hidden vectors, the chosen experts' neurons, attention scores."""
    config: Any = weights.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    return FLOAT32 * (16 * hidden + 4 * 8 * width + 2 * heads * length)


def check_resources(needed: dict[str, Any], out: str | Path, resume: bool = False) -> None:
    """DoesNotFit if this machine has less memory, or the disk of `out` less space, than is needed. Before every run, not only a dry one.

    What this process holds already counts as free, and so does unfinished work that is continued.
    """
    memory = available_memory() + resident_memory()
    if needed["peak_memory_bytes"] > memory:
        raise DoesNotFit(
            f"this needs {_size(needed['peak_memory_bytes'])} of memory, {_size(memory)} are free",
            "use --low-memory, a smaller --reservoir, or a larger machine",
        )
    path = Path(out).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    work = path.with_name(path.name + ".partial")
    begun = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) if resume and work.is_dir() else 0
    free = shutil.disk_usage(there).free + begun
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


def resident_memory() -> int:
    """Bytes of memory that this process holds."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0

"""What a job will need, before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefact.source import Weights
from ..calibrate.options import settings
from ..calibrate.run import bounded_capacity, declared_bytes
from ..checkpoint import LayerStream, read_manifest
from ..checkpoint.manifest import MANIFEST, WEIGHTS_FILE
from ..compress.codec import codecs
from ..compress.merge.cluster import TOGETHER
from ..compress.quantize.decoded import KEPT_BYTES, matrices
from ..elastic.runtime import experts_per_token
from ..errors import DoesNotFit, UsageError
from ..frontier.measure import BATCH
from ..heap import return_freed_pages
from ..memory import available_memory, resident_memory
from ..methods.quantize.uniform_bits import STANDING
from ..model import MoELayer, find_layers, load_model
from ..options.calibrate import CalibrateOptions
from ..options.machine import OtherMachine
from ..options.recover import RecoverOptions
from ..options.refactor import RefactorOptions
from ..partition.base import check_blocks
from ..recover.repair import Normal
from .model_shape import config_tree

LOADED = 560 << 20  # Python with torch, transformers and numba loaded
KEPT = 80 << 20  # threads, text, and what the allocator keeps
FLOAT32 = 4
LOGITS_HELD = 5  # of the source and of a point, as logits, as log-probabilities, and what their difference is computed in
KERNELS = 72 << 20  # compiled for sub-experts
CHOOSING = 16 << 20  # what chooses slots alone: 14 MiB where it is compiled in the run, 1 where that was kept
REPORT = 330 << 20  # altair, and what draws a page's charts: a browser's engine
SIZED_FOR: ContextVar[OtherMachine | None] = ContextVar("SIZED_FOR", default=None)
"""In a rehearsal, the machine that it is for, where that is another one."""
RUNNING = ("weights_bytes", "side_bytes", "activations_bytes", "logits_bytes")


def held_bytes(weights: Weights, calibration: CalibrateOptions) -> int:
    """Hidden states of all text that waits before a decoder layer, and what the model keeps beside them."""
    return 2 * calibration.tokens * largest_layer(weights).hidden * FLOAT32


def needed_by_pass(weights: Weights, options: CalibrateOptions, written: int = 0) -> dict[str, Any]:
    """What a calibration needs, and so many bytes of disk beside it."""
    parts, declared, _ = pass_parts(weights, options)
    return told(parts, 2 * declared + written)


def needed_by_rewriting(weights: Weights, written: int) -> dict[str, Any]:
    """What a command needs that reads weights a layer at a time and writes them, without running the model."""
    layer = largest_layer(weights)
    experts = layer.num_experts * layer.parameters_per_expert() * FLOAT32
    return told({"weights_bytes": 3 * experts}, written)


def needed_by_merging(weights: Weights, options: CalibrateOptions | None, written: int) -> dict[str, Any]:
    """What merging a layer's experts needs, after a pass where there is one: the layer, its neurons in a form to compare, new ones."""
    layer = largest_layer(weights)
    merging = {"weights_bytes": 3 * layer.num_experts * layer.parameters_per_expert() * FLOAT32, "likeness_bytes": 4 * TOGETHER}
    if options is None:
        return told(merging, written)
    parts, declared, _ = pass_parts(weights, options)
    return told(largest([parts, merging]), 2 * declared + written)


def needed_by_adoption(weights: Weights, options: CalibrateOptions, written: int) -> dict[str, Any]:
    """A calibration of the quantized model; its weights and the elastic one's are compared a layer at a time, and it is measured."""
    parts, declared, _ = pass_parts(weights, options)
    layer = largest_layer(weights)
    again = needed_by_running(weights.model, rows=BATCH * options.length, cut=2, low_memory=options.low_memory)
    measured = {name: again[name] for name in RUNNING} | {"statistics_bytes": parts["statistics_bytes"], "kernels_bytes": KERNELS}
    measured["weights_bytes"] += 3 * layer.num_experts * layer.parameters_per_expert() * FLOAT32
    return told(largest([parts, measured]), 2 * declared + written)


def needed_by_recovery(model: Any, ids: Tensor, options: RecoverOptions, written: int) -> dict[str, Any]:
    """What a recovery needs of a model that is loaded already: its side tensors and equations come on top."""
    needed = needed_by_running(model, rows=BATCH * ids.shape[1], cut=2, low_memory=options.low_memory)
    parts = {name: needed[name] for name in RUNNING} | {"kernels_bytes": KERNELS}
    if options.method == "repair":  # the model's own experts run; slots are chosen, and no logits computed
        layers = [layer.parts for layer in model._moe_prism.layers]
        bands = min(options.bands, layers[0].n_sub - 1)
        equations = min(options.memory_mib << 20, sum(Normal.bytes(own, bands) for own in layers))
        gathering = parts | {"logits_bytes": 0, "kernels_bytes": CHOOSING, "equations_bytes": equations}
        solving = max(Normal.solving_bytes(own, bands) for own in layers)
        parts = largest([gathering, {**gathering, "activations_bytes": 0, "equations_bytes": equations + solving}])
    return told(parts, written, held=sum(p.nbytes for p in model.parameters() if not p.is_meta))


def needed_by_training(model: Any, rows: int, written: int) -> dict[str, Any]:
    """What training a model's routers needs: rows tokens go forward and backward together, through all layers."""
    needed = needed_by_running(model, rows=rows, cut=1, back=rows)
    return told({name: needed[name] for name in RUNNING}, written)


def model_tree(where: Path | str) -> Any:
    """A model without weights, of a folder that is checked to be whole; of a GGUF file with them."""
    path = Path(where)
    if path.is_dir() and (path / MANIFEST).is_file() and WEIGHTS_FILE in read_manifest(path):
        return config_tree(path)  # an adopted GGUF file
    return LayerStream(path, torch.float32).model if path.is_dir() else load_model(path, torch.float32)


def needed_by_running(
    model: Any, *, rows: int, cut: int, fits: bool = False, back: int = 0, low_memory: bool = False
) -> dict[str, Any]:
    """What a command needs that loads the model and runs text through it.

    rows: tokens that run together; cut: sub-experts per expert (1: whole experts, without side tensors); fits: whether methods gather
    statistics of their own; back: tokens that go backward together; low_memory: whether one decoder layer is in memory at a time.
    """
    layers = find_layers(model)
    config = model.config.get_text_config()
    largest = max(layers, key=lambda x: x.num_experts * x.parameters_per_expert())
    experts = largest.num_experts * largest.parameters_per_expert() * FLOAT32
    everything = sum(p.numel() for p in model.parameters()) * FLOAT32
    side = sum(layer.num_experts * cut * (2 * layer.hidden + 64) * FLOAT32 for layer in layers) if cut > 1 else 0
    parts = {
        "weights_bytes": 3 * experts if low_memory else everything + experts,
        "side_bytes": side,
        "activations_bytes": max(rows * (2 if fits else 1), back * (1 + config.num_hidden_layers))
        * row_bytes(model, largest, rows),
        "logits_bytes": LOGITS_HELD * rows * config.vocab_size * FLOAT32,
        "kernels_bytes": KERNELS if cut > 1 else 0,
    }
    return told(parts, 0)


def needed_by_frontier(model: Any, running: Mapping[str, int], *, low_memory: bool, encodes: bool) -> dict[str, Any]:
    """What measuring operating points needs, and the report that is written after that, when the model is still there.

    running: of `needed_by_running`; encodes: whether methods run the model with its experts in fewer bits, beside int8 and int4.
    """
    measured = {name: running[name] for name in (*RUNNING, "kernels_bytes")}
    own, more = (0, 0) if low_memory else encoded_bytes(find_layers(model), encodes)
    kept = {name: measured[name] for name in ("weights_bytes", "side_bytes", "kernels_bytes")} | {"encoded_bytes": more}
    measured["encoded_bytes"] = own + more  # its own experts wait only while it runs in fewer bits
    return told(largest([measured, {**kept, "report_bytes": REPORT}]), 0)


def encoded_bytes(layers: Sequence[MoELayer], methods: bool) -> tuple[int, int]:
    """What a frontier holds beside a model that runs in fewer bits: the model's own experts, and those of int8 and int4.

    methods: whether methods encode more; what is kept of all then has a limit.
    """
    own = sum(w.numel() for layer in layers for w in matrices(layer)) * FLOAT32
    limit = max(KEPT_BYTES, own)
    if methods:
        return own, limit
    codec = codecs.get("rtn")()
    shapes = [tuple(w.shape) for layer in layers for w in matrices(layer)]
    return own, min(limit, sum(codec.bytes(shape, bits, codec.groups[0]) for _, bits in STANDING for shape in shapes))


def told(parts: dict[str, int], disk: int, held: int = 0) -> dict[str, Any]:
    """As `--dry-run` shows it: the parts of the largest phase, and the process that holds them. held: bytes of them that it has by now."""
    return_freed_pages()  # what the checks have freed is there for the work: it must not count beside that
    parts = {"process_bytes": max(resident_memory() - held, LOADED) + KEPT, **parts}
    return {"peak_memory_bytes": sum(parts.values()), "disk_bytes": disk, **parts}


def largest(phases: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of phases that follow each other, the one that takes the most."""
    return max(phases, key=lambda parts: sum(parts.values()))


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
    if run.goes_back:  # a window at a time, and what every decoder layer computed of it waits for the way back
        tokens = calibration.length * (1 + text_config(weights).num_hidden_layers)
        everything += experts  # products on the way back want a layer's matrices the other way round
    parts = {
        "weights_bytes": 3 * experts if calibration.low_memory else everything + experts,
        "statistics_bytes": declared,
        "activations_bytes": tokens * row_bytes(weights.model, layer, calibration.length),
        "hidden_bytes": held_bytes(weights, calibration) if calibration.low_memory else 0,
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


def row_bytes(model: Any, layer: MoELayer, length: int) -> int:
    """Live activations per token of a decoder layer: 16 hidden vectors, chosen neurons, scores of attention where they are written."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1) if getattr(config, "_attn_implementation", "eager") == "eager" else 0
    return FLOAT32 * (16 * layer.hidden + 4 * experts_per_token(model, layer) * layer.width + 2 * heads * length)


def sampled_rows(weights: Weights, calibration: CalibrateOptions, capacity: int) -> int:
    """Rows of the samples of all experts of a layer: no more than there are places, or choices."""
    layer = largest_layer(weights)
    return min(layer.num_experts * capacity, calibration.tokens * experts_per_token(weights.model, layer))


def check_resources(
    needed: Mapping[str, Any], out: str | Path, resume: bool = False, machine: OtherMachine | None = None
) -> None:
    """DoesNotFit if this machine has less memory, or the disk of `out` less space, than is needed. Before every run, not only a dry one.

    What this process holds already counts as free, and so does unfinished work that is continued. machine: what has another size.
    """
    machine = machine or OtherMachine()
    memory = free_memory() if machine.ram is None else machine.ram
    if needed["peak_memory_bytes"] > memory:
        free = f"{_size(memory)} are free" if machine.ram is None else f"such a machine has {_size(memory)}"
        raise DoesNotFit(
            f"this needs {_size(needed['peak_memory_bytes'])} of memory, {free}",
            "use --low-memory, a smaller --reservoir, or a larger machine",
            needed,
        )
    if machine.disk is None:
        _check_disk(needed, out, resume)
    elif needed["disk_bytes"] > machine.disk:
        sizes = f"this needs {_size(needed['disk_bytes'])} of disk, such a machine has {_size(machine.disk)}"
        raise DoesNotFit(sizes, "use a larger one", needed)


def free_memory() -> int:
    """What this process may take, and what it holds already."""
    return available_memory() + resident_memory()


def _check_disk(needed: Mapping[str, Any], out: str | Path, resume: bool) -> None:
    """That of `out`."""
    path = Path(out).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    work = path.with_name(path.name + ".partial")
    begun = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) if resume and work.is_dir() else 0
    free = shutil.disk_usage(there).free + begun
    if needed["disk_bytes"] > free:
        raise DoesNotFit(
            f"this needs {_size(needed['disk_bytes'])} of disk, {_size(free)} are free at '{out}'",
            "free some, or choose another --out",
            needed,
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

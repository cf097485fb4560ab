"""Load an elastic model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import check_listed, elastic_manifest, read_header
from ..checkpoint.finished import check_files
from ..checkpoint.links import inside
from ..checkpoint.manifest import WEIGHTS_FILE, check_layers
from ..checkpoint.tensors import read_tensor
from ..elastic import attach
from ..elastic.side_tensors import AGAIN, CUTOFFS, RIDGE, check_values, of_today
from ..errors import CorruptError, UsageError
from ..model import find_layers, load_model, load_to_run, load_tokenizer
from ..model.place import placement, stays_on_cpu
from ..model.widen import widen
from ..schema.read import one_line
from ..store import StoreOptions, load_stored

SIDE_FILE = "prism.safetensors"
DECIDING = (SIDE_FILE, "config.json")
_NAME = re.compile(r"layers\.(?P<layer>[0-9]{1,6})\.(?P<name>.+)")


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    store: StoreOptions | None = None,
    verify: bool = False,
    wide: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder written by `refactor`: a transformers model that is elastic and runs at full budget.

    Change the price with `operating_point(model, budget=...)`.
    dtype None: the checkpoint's own on a GPU; on a CPU float32, but for bfloat16 experts, which the compiled products read as they are.
    store: keep the experts on disk and this much of them in memory; the model then runs on the CPU in float32 (docs/explanation/store.md).
    wide: float32 experts on a CPU in any case, for whoever changes weights or asks for gradients.
    verify: recompute the sha256 of every file first; without, those of the small files that decide what is computed.
    Raises UsageError for a folder that is not a refactored model, CorruptError for a file that is damaged, changed or does not fit.

    >>> import moe_prism
    >>> model, tokenizer = moe_prism.load("elastic")
    >>> model.config.model_type
    'olmoe'
    """
    manifest = whole_manifest(folder, verify)
    tensors = side_tensors(folder, len(manifest["layers"]))
    check_complete(folder, tensors)
    if store is not None and WEIGHTS_FILE in manifest:
        raise UsageError(
            f"'{folder}' holds a GGUF file, whose experts cannot be read one by one", "run it without --expert-memory"
        )
    if store is not None:
        stays_on_cpu("--expert-memory")
        return load_stored(Path(folder), manifest, tensors, store), load_tokenizer(folder)
    file = manifest.get(WEIGHTS_FILE)  # of an adopted GGUF
    where = Path(folder) / file if file else folder
    place = placement()
    on_cpu = place.device == "cpu" or (place.device is None and place.device_map is None and not torch.cuda.is_available())
    narrow = on_cpu and not wide and dtype is None and place.dtype is None
    model = load_model(where) if narrow else load_to_run(where, dtype)
    if narrow and model.dtype != torch.bfloat16:
        widen(model, [])  # before anything is computed: float16 may not hold what experts put out
    layers = find_layers(model)
    check_layers(folder, manifest, layers)
    if narrow:
        widen(model, layers)
    if model.device.type == "cpu":
        for layer in layers:
            layer.arrange()
    attach(model, manifest["n_sub"], gates=manifest["gates"], tensors=tensors, layers=layers)
    model._moe_prism.stored_bytes_per_weight = manifest["bytes_per_weight"]
    return model, load_tokenizer(folder)


def whole_manifest(folder: str | Path, every: bool = False) -> dict[str, Any]:
    """prism.json of an elastic model whose small files, those that decide what it computes, are the ones it lists.

    every: all files are, and there are no others, as `verify` has it. CorruptError names what is not so.
    """
    manifest = elastic_manifest(folder)
    if every:
        check_files(folder, manifest)
    else:
        check_listed(folder, manifest, DECIDING)
    return manifest


def side_tensors(folder: str | Path, layers: int) -> list[dict[str, torch.Tensor]]:
    """Side tensors per layer from prism.safetensors, whose names are `layers.<i>.<tensor>`, by today's names, in range.

    CorruptError names what is not. Their shapes are checked against the model when it is made elastic.
    """
    own: list[dict[str, torch.Tensor]] = [{} for _ in range(layers)]
    path = Path(folder) / SIDE_FILE
    for key, tensor in read_tensors(path).items():
        found = _NAME.fullmatch(key)
        if found is None or int(found["layer"]) >= layers:
            raise CorruptError(f"{path}: '{one_line(key)}' belongs to none of {layers} layers", "build the folder again")
        own[int(found["layer"])][found["name"]] = tensor
    today = [of_today(tensors) for tensors in own]
    for i, tensors in enumerate(today):
        check_values(f"{path}: layer {i}", tensors)
    return today


def check_complete(folder: str | Path, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """CorruptError for side tensors without those that every elastic model has, or not the same in all layers."""
    path = Path(folder) / SIDE_FILE
    for i, own in enumerate(tensors):
        for name in dict.fromkeys((RIDGE, CUTOFFS, *tensors[0], *own)):
            if name not in own or name not in tensors[0]:
                raise CorruptError(f"{path}: layer {i if name not in own else 0} has no '{name}'", AGAIN)


def flat_side_tensors(layers: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same by the names they have in the file."""
    return {f"layers.{i}.{name}": tensor for i, tensors in enumerate(layers) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file of ours. CorruptError if it is missing or damaged, or a link that leads out of the folder."""
    header = read_header(inside(path))
    return {info.name: read_tensor(path, info) for info in header.tensors}

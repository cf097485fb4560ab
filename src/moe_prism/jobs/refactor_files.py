"""The files beside the weights that a refactoring writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artefact.keep_format import discard_sums
from ..artefact.load import SIDE_FILE, read_tensors
from ..artefact.source import Weights
from ..checkpoint import OutputFolder, read_header
from .calibrate import discard_snapshots
from .refactor_card import model_card
from .refactor_units import profile_name, read_unit, unit_name
from .solve_layer import WORKING

CUTOFFS_FILE = "cutoffs.safetensors"


def write_side_files(folder: OutputFolder, weights: Weights, facts: Mapping[str, Any]) -> None:
    """prism.safetensors and the model card; work files leave, so that what is renamed is only the result."""
    side = {
        f"layers.{layer.index}.{name}": tensor
        for layer in weights.layers
        for name, tensor in read_unit(folder, layer).items()
        if name not in WORKING
    }
    if (folder.work / CUTOFFS_FILE).exists():
        side |= read_tensors(folder.work / CUTOFFS_FILE)
    folder.save_tensors(SIDE_FILE, side, {"format": "pt"})
    folder.write_bytes("README.md", model_card(facts, weights.model.config.model_type).encode())
    # vLLM loads every *.safetensors of a folder that has no index: name the weights, so that the side file is not taken for them
    index, single = folder.work / "model.safetensors.index.json", folder.work / "model.safetensors"
    if single.exists() and not index.exists():
        folder.write_bytes(index.name, single_index(single))
    for layer in weights.layers:
        folder.discard(unit_name(layer))
    discard_snapshots(folder)
    discard_sums(folder)
    folder.discard(CUTOFFS_FILE)
    for i in range(1 + facts["options"]["profile_points"]):
        folder.discard(profile_name(i))


def single_index(single: Path) -> bytes:
    """An index that names one file of weights, for tools that would else take every safetensors file of a folder for weights."""
    names = sorted(info.name for info in read_header(single).tensors)
    return json.dumps(
        {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(names, single.name)}, indent=1
    ).encode()

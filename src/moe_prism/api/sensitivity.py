"""How much each layer's dropped slots cost in output quality: one short run per layer, on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..elastic import attach
from ..elastic.runtime import Setting
from ..elastic.threshold import dropped_energy
from ..frontier.measure import measure
from ..model import find_layers, load_model
from .progress import Update

PROFILE_BUDGET = 0.5
LOGIT_ROWS = 512  # tokens whose logits are held at a time: with a vocabulary of 150,000 some 2 GB


def sensitivity(
    where: Path | str, units: Sequence[dict[str, Tensor]], n_sub: int, gates: int, ids: Tensor, update: Update
) -> list[float]:
    """KL per unit of dropped squared value of each layer, with that layer alone at half its slots.

    units: tensors per layer; ids: windows [n, length]. Holds the whole model. With the result, sums of squares of different layers
    can be compared (see `pool_levels`).
    """
    model = load_model(where, None if torch.cuda.is_available() else torch.float32)
    model = model.cuda() if torch.cuda.is_available() else model
    layers = find_layers(model)
    for layer, unit in zip(layers, units, strict=True):
        layer.permute(unit["perm"])
    tensors = [{k: v for k, v in unit.items() if k != "perm"} for unit in units]
    elastic = attach(model, n_sub, gates=gates, tensors=tensors, layers=layers)
    settings = [
        Setting(rule="threshold", layers=tuple(PROFILE_BUDGET if i == j else 1.0 for j in range(len(layers))))
        for i in range(len(layers))
    ]
    measured = measure(model, elastic, ids, settings, batch=max(1, LOGIT_ROWS // ids.shape[1]), progress=update)
    return [
        quality.kl / max(dropped_energy(unit["levels"], PROFILE_BUDGET), 1e-30)
        for (quality, _), unit in zip(measured, units, strict=True)
    ]

"""How much each layer's dropped slots cost in output quality: one short run per layer, on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data import token_windows
from ..elastic import attach
from ..elastic.runtime import Setting
from ..elastic.threshold import dropped_energy
from ..frontier.measure import measure
from ..model import find_layers, load_model, load_tokenizer
from .progress import Update

PROFILE_TOKENS = 4096
PROFILE_BUDGET = 0.5


def sensitivity(
    where: Path | str, units: Sequence[dict[str, Tensor]], n_sub: int, gates: int, text: str, length: int, update: Update
) -> list[float]:
    """KL per unit of dropped squared value of each layer, with that layer alone at half its slots. units: tensors per layer.

    Holds the whole model; with it, sums of squares of different layers can be compared (see `pool_levels`).
    """
    model = load_model(where, None if torch.cuda.is_available() else torch.float32)
    model = model.cuda() if torch.cuda.is_available() else model
    layers = find_layers(model)
    for layer, unit in zip(layers, units, strict=True):
        layer.permute(unit["perm"])
    tensors = [{k: v for k, v in unit.items() if k != "perm"} for unit in units]
    elastic = attach(model, n_sub, gates=gates, tensors=tensors, layers=layers)
    windows = token_windows(load_tokenizer(where), text, "calibration", length=length, tokens=PROFILE_TOKENS)
    settings = [
        Setting(rule="threshold", layers=tuple(PROFILE_BUDGET if i == j else 1.0 for j in range(len(layers))))
        for i in range(len(layers))
    ]
    measured = measure(model, elastic, windows.ids, settings, batch=1, progress=update)
    return [
        quality.kl / max(dropped_energy(unit["levels"], PROFILE_BUDGET), 1e-30)
        for (quality, _), unit in zip(measured, units, strict=True)
    ]

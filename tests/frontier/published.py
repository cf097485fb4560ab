"""Tokens/s that arXiv 2505.03531 publishes, and the forecast fitted to them with nothing but bandwidth, peak and fixed cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from moe_prism.forecast.step_time import ExpertLayer, Fit, Read, Shape, StepLoad, Terms, fit, terms

TABLES = json.loads(Path(__file__).with_name("published.json").read_text())
NAMES = ("skip-v2-lite", "skip-v3", "prune-v2-lite")
CONTEXT = 1024 + 1024 / 2  # 1024 tokens in, on average half of 1024 out
PROMPT = 1.0  # prompt tokens per generated token

# the models' published configurations, multi-head latent attention; V3's weights are FP8
SHAPES = {
    "v2-lite": Shape((ExpertLayer(64, 6, 3 * 2048 * 1408),) * 26, 0, 27 * 576, 27 * 2 * 16 * (192 + 128)),
    "v3": Shape((ExpertLayer(256, 8, 3 * 7168 * 2048),) * 58, 0, 61 * 576, 61 * 2 * 128 * (192 + 128), bytes_per_weight=1),
}
REST = {
    "v2-lite": 27 * (2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048)
    + 26 * (3 * 2048 * 2816 + 2048 * 64)
    + 3 * 2048 * 10944
    + 102400 * 2048,
    "v3": 61 * (7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168)
    + 58 * (3 * 7168 * 2048 + 7168 * 256)
    + 3 * 3 * 7168 * 18432
    + 129280 * 7168,
}


def shape(model: str) -> Shape:
    return Shape(**{**vars(SHAPES[model]), "rest": REST[model]})


@dataclass(frozen=True)
class Reproduced:
    """rank: Spearman correlation of predicted and published ratios to full; speedup: median relative error of these ratios."""

    fit: Fit
    rank: float
    speedup: float
    cells: int


def reproduce(name: str, prompt: float = PROMPT) -> Reproduced:
    """Fit a machine to a table and compare its ratios to full with the published ones."""
    table = TABLES[name]
    model, values = shape(table["model"]), table["values"]
    steps: list[list[tuple[Terms, float]]] = []
    for batch, row in table["tokens_per_s"].items():
        needs = [terms(model, _choice(model, name, value), StepLoad(int(batch), CONTEXT, prompt)) for value in values]
        # the benchmark counts prompt tokens too, so a request makes two tokens per step
        steps.append([(need, 2 * int(batch) / speed) for need, speed in zip(needs, row, strict=True)])
    found = fit([cell for row in steps for cell in row], per_token=False)
    predicted = [found.machine.seconds(row[0][0]) / found.machine.seconds(need) for row in steps for need, _ in row[1:]]
    published = [row[0][1] / seconds for row in steps for _, seconds in row[1:]]
    off = np.abs(np.array(predicted) / np.array(published) - 1)
    return Reproduced(found, float(spearmanr(predicted, published)[0]), float(np.median(off)), len(predicted))


def _choice(model: Shape, name: str, value: int) -> tuple[Read, ...]:
    """Even routing: `value` experts per token, or `value` experts in all."""
    layer = model.layers[0]
    experts, chosen = (value, layer.chosen) if name.startswith("prune") else (layer.experts, value)
    return (Read((np.full(experts, chosen / experts),) * len(model.layers)),)

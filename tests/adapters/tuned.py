"""Fine-tunes for tests: a checkpoint with a few other experts, and the adapter that is made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from moe_prism.jobs.adapter import make_adapter
from moe_prism.model import find_layers, load_model

TUNED = ([[0, 2], [1]], [[3], []], [[0, 1], [1, 3]])
"""Experts per layer of each adapter of the tiny model."""


def fine_tune(base: Path, out: Path, experts: list[list[int]], seed: int = 0, size: float = 0.3) -> Path:
    """A copy of a checkpoint's plain files in which these experts are other ones."""
    model = load_model(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, own in zip(find_layers(model), experts, strict=True):
            for expert in own:
                for view in (layer.gate, layer.up, layer.down):
                    view[expert] += size * torch.randn(view[expert].shape, generator=g).to(view)
    model.save_pretrained(out)
    for file in base.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def three(base: Path, folder: Path) -> None:
    """t0..t2 and their adapters a0..a2."""
    folder.mkdir(parents=True)
    for i, experts in enumerate(TUNED):
        tuned = fine_tune(base, folder / f"t{i}", experts, seed=i)
        make_adapter(tuned, base, folder / f"a{i}")

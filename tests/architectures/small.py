"""Trainings of a second, for tests of architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_prism.architectures import architectures
from moe_prism.architectures.base import Architecture, TokenIds
from moe_prism.jobs.train import Trained, train
from moe_prism.training.loop import draw_weights

VOCABULARY = TokenIds(64, 0, 0, 0)


def example(name: str, **settings: Any) -> Architecture:
    """The example of an architecture, with some settings of our own."""
    kind = architectures.get(name)
    shape, own = kind.example()
    return kind(shape, own | settings)


def model_of(architecture: Architecture, seed: int = 0) -> Any:
    """A small model with drawn weights, whose experts are computed one after the other in every class."""
    model = architecture.build(architecture.config(VOCABULARY)).eval()
    model.config._experts_implementation = "eager"
    draw_weights(model, seed)
    return model


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Of two short texts."""
    ids = torch.randint(0, VOCABULARY.size, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """A recipe of six steps of an architecture's example."""
    shape, settings = architectures.get(name).example()
    found = {"architecture": name, "settings": settings, "model": shape.model_dump(), "text": ["topics"], "tokens": 6000}
    return found | {"steps": 6, "batch": 2, "length": 64, "keep_every": 2, "judge_every": 3} | changes


def trained(folder: Path, name: str, **changes: Any) -> Trained:
    """The example, trained into a folder."""
    return train(recipe(name, **changes), folder)

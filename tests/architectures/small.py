"""Trainings of a second, for tests of architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_prism.architectures import architectures
from moe_prism.architectures.base import Architecture, TokenIds
from moe_prism.jobs.train import Trained, train
from moe_prism.training.loop import draw_weights

VOCABULARY = TokenIds(64, 0, 0, 0)


def example(name: str, **settings: Any) -> Architecture:
    """The example of an architecture, with some settings of our own. active: in the place of the shape's."""
    kind = architectures.get(name)
    shape, own = kind.example()
    shape = shape.model_copy(update={"active": settings.pop("active", shape.active)})
    return kind(shape, own | settings)


def model_of(architecture: Architecture, seed: int = 0) -> Any:
    """A small model with drawn weights, whose experts are computed one after the other in every class."""
    model = architecture.build(architecture.config(VOCABULARY)).eval()
    model.config._experts_implementation = "eager"
    draw_weights(model, seed)
    return model


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Of two short texts, or of noise that is to be two digits."""
    if model.main_input_name == "pixels":
        noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
        return model(pixels=noise, time=torch.tensor([0.1, 0.8]), classes=torch.tensor([3, 10]))
    ids = torch.randint(0, VOCABULARY.size, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def draws(name: str) -> bool:
    """Whether it learns from pictures, not from text."""
    kind = architectures.get(name)
    return kind(*kind.example()).task() is not None


def need_pictures(name: str) -> None:
    """Skip where the data of an architecture are not installed."""
    if draws(name):
        pytest.importorskip("sklearn")


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """A recipe of six steps of an architecture's example."""
    shape, settings = architectures.get(name).example()
    found = {"architecture": name, "settings": settings, "model": shape.model_dump()}
    if not draws(name):
        found |= {"text": ["topics"], "tokens": 6000, "length": 64}
    return found | {"steps": 6, "batch": 2, "keep_every": 2, "judge_every": 3} | changes


def trained(folder: Path, name: str, **changes: Any) -> Trained:
    """The example, trained into a folder."""
    return train(recipe(name, **changes), folder)

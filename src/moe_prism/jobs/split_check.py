"""How far a split model with all experts on is from the dense one, on text, a decoder layer in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefact.source import Weights
from ..checkpoint import LayerStream
from ..errors import UsageError

TOKENS = 64


@torch.no_grad()
def dense_difference(weights: Weights, written: Path, ids: Tensor, experts: int) -> float:
    """The largest difference of a logit, over the largest logit, in float32. Loads what was written as anybody would.

    UsageError where that is no rounding: then the result is no split of this model.
    """
    rows = ids[:1, :TOKENS]
    if weights.stream:
        with weights.stream.streaming() as dense:
            expected = dense(input_ids=rows, use_cache=False).logits.float()
    else:  # in the type that was written, which rounds what a GGUF file says; nobody needs the model after this
        for parameter in weights.model.parameters():
            parameter.copy_(parameter.to(weights.written))
        expected = weights.model(input_ids=rows, use_cache=False).logits.float()
    stream = LayerStream(written, torch.float32)
    _set_active(stream.model, experts)
    with stream.streaming() as split:
        found = split(input_ids=rows, use_cache=False).logits.float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference > 0.05:
        raise UsageError(
            f"with all experts on, the result is {difference:.2g} away from the dense model",
            "report it; the family computes otherwise",
        )
    return difference


def _set_active(model: Any, experts: int) -> None:
    """Have every router choose so many experts."""
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "num_experts"):
            module.top_k = experts

"""What half of the budget buys on this machine: the experts of one layer, timed for the shapes of known models and of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from ..elastic.base import LayerParts
from ..elastic.runtime import experts_per_token
from ..model import find_layers
from .model_shape import config_tree

N_SUB = 4
TOKENS = (1, 8, 32)


class ExpertShape(NamedTuple):
    """Experts, experts per token, hidden size and neurons of one layer."""

    experts: int
    k: int
    hidden: int
    width: int


KNOWN = {"OLMoE-1B-7B": ExpertShape(64, 8, 2048, 1024), "Qwen3-30B-A3B": ExpertShape(128, 8, 2048, 768)}


@dataclass(frozen=True)
class HalfBudget:
    """One measurement. full, half: time of the full budget and of half of it, as a share of the stock layer's; full_by: who computes it."""

    shape: str
    tokens: int
    stock_ms: float
    full: float
    half: float
    full_by: str


def shape_of_model(folder: str | Path) -> ExpertShape:
    """The experts of a folder's first MoE layer. UsageError where there is none."""
    model = config_tree(folder)
    layer = find_layers(model, dense=False)[0]
    return ExpertShape(layer.num_experts, experts_per_token(model, layer), layer.hidden, layer.width)


def half_budget(shapes: dict[str, ExpertShape], tokens: Sequence[int] = TOKENS) -> Iterator[HalfBudget]:
    """Measure shapes one after the other, float32 weights, a part of each: about a second of one thread per shape.

    Choosing the slots comes on top: about 1 % of a layer of a large model, more of a small one.
    """
    from ..elastic.execute.times import Sample, measure  # compiles on first use

    for name, (experts, k, hidden, width) in shapes.items():
        samples = [Sample.of(experts, k, count, 3 * hidden * width) for count in tokens]
        # a batch of one token meets its own experts and no other
        samples = [s._replace(experts=s.k) if s.tokens == 1 else s for s in samples]
        parts = _layer(max(s.experts for s in samples), k, hidden, width)
        for count, sample in zip(tokens, samples, strict=True):
            times = measure(parts, sample)
            by = "tiles" if times.tiles_win else "stock"
            half = min(times.half, times.stock)  # whole experts take over where blocks would take longer
            part = sample.tokens * sample.k / (count * k)
            yield HalfBudget(name, count, 1e3 * times.stock / part, times.whole / times.stock, half / times.stock, by)


def _layer(experts: int, k: int, hidden: int, width: int) -> LayerParts:
    """A layer of so many experts, stored as `moe_prism.load` stores it. What the weights are does not matter for time."""
    config: Any = OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    module = OlmoeExperts(config)
    for p in module.parameters():
        torch.nn.init.constant_(p, 0.01)
    holder: Any = torch.nn.Module()
    holder.experts, holder.config = module, config
    (layer,) = find_layers(holder)
    layer.arrange()
    return LayerParts(layer, N_SUB if width % N_SUB == 0 else 1, 0)


def as_json(found: Sequence[HalfBudget]) -> list[dict[str, Any]]:
    """The measurements as they stand in `doctor --json`."""
    return [asdict(one) for one in found]

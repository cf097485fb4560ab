"""What a layer's weights cost to read: told by the storage, for whatever `counter.py` counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..point import SlotBits
from .base import LayerParts, Scorer
from .coded import row_bytes
from .compensate import Compensator
from .counter import at_width


@dataclass(frozen=True)
class Prices:
    """Weights and bytes of one reading, by what is read.

    blocks [E, N]: a sub-expert. low [E, N]: the same in its smaller form. experts [E]: what an expert reads once if it keeps any block.
    lost [E]: what an expert without a kept block still reads. predictors [E]: what choosing among an expert's blocks reads. tokens [1]:
    what selection reads once per token. gates [E, N]: gate neurons of a candidate block that is not kept; dropped [E, N]: what makes up
    for it; scaled [E]: what compensation reads for an expert that keeps some. extra [1]: a weight of an expert that is no matrix.
    """

    weights: Mapping[str, Tensor]
    bytes: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self, counts: Mapping[str, Tensor]) -> tuple[float, float]:
        """(weights, bytes) of all that was counted: the one multiplication that a cost is made of."""
        return _dot(counts, self.weights), _dot(counts, self.bytes)

    def with_low(self, size: int) -> Prices:
        """The same where blocks have a smaller form of `size` bytes too; it has as many weights."""
        blocks = self.weights["blocks"]
        return Prices({**self.weights, "low": blocks}, {**self.bytes, "low": torch.full_like(blocks, float(size))})


def _dot(counts: Mapping[str, Tensor], prices: Mapping[str, Tensor]) -> float:
    return sum(float((counts[name].to("cpu", torch.float64) * prices[name]).sum()) for name in counts if name in prices)


def with_bits(prices: Prices, parts: LayerParts, bits: SlotBits) -> Prices:
    """The same where a slot may be read at several widths, and gate neurons at the width of choosing.

    A kept block contains its gate neurons at its own width; where choosing reads more bits of them, those come on top.
    """
    layer, stored = parts.layer, prices.bytes["blocks"] / prices.weights["blocks"]
    matrices = 2 if layer.gate is not None else 1
    biases = sum(b is not None for b in (layer.gate_bias, layer.up_bias))
    sizes, weights = dict(prices.bytes), dict(prices.weights)
    chosen = row_bytes(layer.hidden, bits.choosing, bits.group)
    gates = parts.gates * matrices * float("predictors" in prices.weights)
    sizes["gates"] = torch.full_like(sizes["gates"], gates * chosen) + gates * biases * stored
    for width in bits.widths:
        row = row_bytes(layer.hidden, width, bits.group)
        more = gates * max(0, chosen - row)
        sizes[at_width(width)] = parts.block * ((matrices + 1) * row + biases * stored) + more
        weights[at_width(width)] = prices.weights["blocks"]
    if bits.router is not None:
        weights["predictors"] = torch.full((layer.num_experts,), layer.hidden + 1.0, dtype=torch.float64)
        sizes["predictors"] = 2 * weights["predictors"]
    return Prices(weights, sizes)


def block_weights(parts: LayerParts) -> tuple[Tensor, Tensor]:
    """(weights of every block [E, N], weights of an expert's output bias [E])."""
    layer = parts.layer
    bias = 0 if layer.down_bias is None else layer.hidden
    whole = layer.parameters_per_expert() - bias
    blocks = torch.full((layer.num_experts, parts.n_sub), whole / parts.n_sub, dtype=torch.float64)
    return blocks, torch.full((layer.num_experts,), float(bias), dtype=torch.float64)


def prices_of(
    parts: LayerParts,
    scorer: Scorer | None,
    extra: Compensator | None,
    bytes_per_weight: float,
    matrix_bytes: Tensor | None = None,
) -> Prices:
    """Prices of a layer whose blocks are stored alike within an expert.

    scorer, extra: what selection and compensation read, None where there is none. matrix_bytes [E]: bytes of a weight of each expert's
    matrices, default those of any other weight.
    """
    layer = parts.layer
    blocks, bias = block_weights(parts)
    matrices = 2 if layer.gate is not None else 1
    biases = sum(b is not None for b in (layer.gate_bias, layer.up_bias))
    weights = {
        "blocks": blocks,
        "experts": bias.clone(),
        "dropped": torch.zeros_like(blocks),
        "gates": torch.zeros_like(blocks),
        "lost": torch.zeros_like(bias),
    }
    weights["extra"] = torch.ones(1, dtype=torch.float64)
    if scorer is not None:
        weights["predictors"] = torch.full_like(bias, float(scorer.parameters_per_expert()))
        weights["tokens"] = torch.tensor([float(scorer.parameters_per_token())], dtype=torch.float64)
        if scorer.reads_gates:
            weights["gates"] += parts.gates * (matrices * layer.hidden + biases)
    if extra is not None:
        per_slot, per_expert = extra.parameters()
        weights["dropped"] += per_slot
        weights["scaled"] = torch.full_like(bias, float(per_expert))
        weights["lost"] += bias
    sizes = {name: value * bytes_per_weight for name, value in weights.items()}
    if matrix_bytes is not None:
        saved = (bytes_per_weight - matrix_bytes)[:, None]
        for name, neurons in (("blocks", parts.block), ("gates", parts.gates)):
            sizes[name] -= saved * (weights[name] - neurons * biases).clamp(min=0)
    return Prices(weights, sizes)

"""What a layer's weights cost to read: told by the storage, for whatever `counter.py` counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..point import SlotBits
from .base import LayerParts, Scorer
from .coded import row_bytes
from .compensate import Compensator
from .counter import at_width


class StoredAs(NamedTuple):
    """What a change of weights makes of a layer's experts. matrix_bytes [E]: bytes of a weight of each one's matrices; neurons [E, f]
    (bool): those that are there; same [E]: the expert whose weights each one shares; None: as without the change.
    """

    matrix_bytes: Tensor | None = None
    neurons: Tensor | None = None
    same: Tensor | None = None


AS_IT_IS = StoredAs()


@dataclass(frozen=True)
class Prices:
    """Weights and bytes of one reading, by what is read.

    blocks [E, N]: a sub-expert. low [E, N]: the same in its smaller form. experts [E]: what an expert reads once if it keeps any block.
    lost [E]: what an expert without a kept block still reads. predictors [E]: what choosing among an expert's blocks reads. tokens [1]:
    what selection reads once per token. gates [E, N]: gate neurons of a candidate block that is not kept; dropped [E, N]: what makes up
    for it; scaled [E]: what compensation reads for an expert that keeps some. extra [1]: a weight of an expert that is no matrix.
    skipped [E, N]: what a neuron of a block saves where its gate alone is read, below 0.
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
        sizes[at_width(width)] = parts.stored_block * ((matrices + 1) * row + biases * stored) + more
        weights[at_width(width)] = prices.weights["blocks"]
    if bits.router is not None:
        weights["predictors"] = torch.full((layer.num_experts,), layer.hidden + 1.0, dtype=torch.float64)
        sizes["predictors"] = 2 * weights["predictors"]
    return Prices(weights, sizes)


def block_weights(parts: LayerParts, neurons: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weights of every block [E, N], weights of an expert's output bias [E]). neurons [E, f]: those that are there, default all."""
    layer = parts.layer
    bias = 0 if layer.down_bias is None else layer.hidden
    whole = layer.parameters_per_expert() - bias
    if neurons is None:  # of a layer of which no neuron is in memory, too
        blocks = torch.full((layer.num_experts, parts.n_sub), whole / parts.n_sub, dtype=torch.float64)
    else:
        blocks = whole / layer.width * _in_blocks(parts, neurons)
    return blocks, torch.full((layer.num_experts,), float(bias), dtype=torch.float64)


def _in_blocks(parts: LayerParts, neurons: Tensor | None, first: int | None = None) -> Tensor:
    """[E, N] (float64): neurons of every block that are there, of all or of its first ones."""
    size = parts.stored_block if first is None else first
    if neurons is None:
        return torch.full((parts.layer.num_experts, parts.n_sub), float(size), dtype=torch.float64)
    return torch.unflatten(neurons, 1, (parts.n_sub, parts.block))[:, :, :size].sum(2).double()


def prices_of(
    parts: LayerParts,
    scorer: Scorer | None,
    extra: Compensator | None,
    bytes_per_weight: float,
    stored: StoredAs = AS_IT_IS,
) -> Prices:
    """Prices of a layer whose weights are stored alike within an expert.

    scorer, extra: what selection and compensation read, None where there is none. bytes_per_weight: of what `stored` does not say.
    """
    layer = parts.layer
    blocks, bias = block_weights(parts, stored.neurons)
    matrices = 2 if layer.gate is not None else 1
    biases = sum(b is not None for b in (layer.gate_bias, layer.up_bias))
    gates = _in_blocks(parts, stored.neurons, parts.gates)
    weights = {
        "blocks": blocks,
        "experts": bias.clone(),
        "dropped": torch.zeros_like(blocks),
        "gates": torch.zeros_like(blocks),
        "lost": torch.zeros_like(bias),
    }
    weights["skipped"] = torch.full_like(blocks, -(2.0 * layer.hidden + (layer.up_bias is not None)))
    weights["extra"] = torch.ones(1, dtype=torch.float64)
    if scorer is not None:
        weights["predictors"] = torch.full_like(bias, float(scorer.parameters_per_expert()))
        weights["tokens"] = torch.tensor([float(scorer.parameters_per_token())], dtype=torch.float64)
        if scorer.reads_gates:
            weights["gates"] += gates * (matrices * layer.hidden + biases)
    if extra is not None:
        per_slot, per_expert = extra.parameters()
        weights["dropped"] += per_slot
        weights["scaled"] = torch.full_like(bias, float(per_expert))
        weights["lost"] += bias
    sizes = {name: value * bytes_per_weight for name, value in weights.items()}
    if stored.matrix_bytes is not None:
        saved = (bytes_per_weight - stored.matrix_bytes)[:, None]
        for name, neurons in (("blocks", _in_blocks(parts, stored.neurons)), ("gates", gates)):
            sizes[name] -= saved * (weights[name] - neurons * biases).clamp(min=0)
    return Prices(weights, sizes)

"""What a model's experts really read, counted at the weights: sets of (token, expert, neuron), not formulas.

The layers run by the readable executor and scorers. Every use of a weight goes through `MoELayer.activations` and `project`,
the ridge predictor through `ridge.features`, compensation through `Blocks.combine`: these are hooked. A row is known by its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch

from moe_prism.elastic.base import per_expert
from moe_prism.elastic.compensate.base import Blocks
from moe_prism.elastic.scorers import ridge


@dataclass
class Reads:
    """Of one layer. up, down: (token, expert, neuron); bias, predictor: (token, expert); means: (token, block)."""

    up: set = field(default_factory=set)
    down: set = field(default_factory=set)
    bias: set = field(default_factory=set)
    predictor: set = field(default_factory=set)
    means: set = field(default_factory=set)
    sizes: dict = field(default_factory=dict)

    def weights(self, *, distinct: bool) -> int:
        """Weights read by all tokens, or by the batch together."""
        total = 0
        for name in ("up", "down", "bias", "predictor", "means"):
            entries = getattr(self, name)
            if distinct:
                entries = {entry[1:] for entry in entries}
            total += len(entries) * self.sizes.get(name, 0)
        return total


@contextmanager
def counted(elastic) -> Iterator[list[Reads]]:
    """Count what one forward inside the block reads."""
    found = [Reads() for _ in elastic.layers]
    now: list = [None, {}]  # the layer that runs, and token of each row
    with ExitStack() as stack:
        stack.enter_context(mock.patch("moe_prism.elastic.execute.batch_products.usable", lambda *_: None))
        for few in ("scorers.ridge.are_few", "select.are_few"):  # compiled forms for few choices and slots
            stack.enter_context(mock.patch(f"moe_prism.elastic.{few}", lambda *_: False))
        stack.enter_context(mock.patch("moe_prism.elastic.execute.one_call.Ready.is_there", lambda *_: False))
        stack.enter_context(mock.patch("moe_prism.elastic.compensate.mean.FEW", 0))
        features, combine = ridge.features, Blocks.combine

        def counted_features(plan, x, expert, scale):
            reads = now[0]
            reads.predictor |= {(now[1][key(row)], expert) for row in x}
            return features(plan, x, expert, scale)

        def by_expert(self, x, index):
            """What the scorer does in few large operations, expert by expert: these read more than they need."""

            def predict(expert, tokens):
                z = ridge.features(self.parts, x[tokens], expert, self.scale[expert])
                return (z @ self.weight[expert].T).clamp(max=ridge.CEILING).exp()

            return per_expert(index, self.parts.layer.num_experts, predict, self.parts.n_sub)

        def counted_combine(self, table, weight=None):
            reads = now[0]
            reads.sizes["means"] = table.shape[1]
            reads.means |= set(zip(self.token.tolist(), self.block.tolist(), strict=True))
            return combine(self, table, weight)

        stack.enter_context(mock.patch.object(ridge, "features", counted_features))
        stack.enter_context(mock.patch.object(ridge.Ridge, "_all", by_expert))
        stack.enter_context(mock.patch.object(Blocks, "combine", counted_combine))
        for layer, reads in zip(elastic.layers, found, strict=True):
            stack.enter_context(_hooked(layer, reads, now))
        before, elastic.always_split = elastic.always_split, True
        try:
            yield found
        finally:
            elastic.always_split = before


def key(row):
    return row.detach().numpy().tobytes()


@contextmanager
def _hooked(layer, reads, now):
    own = layer.parts.layer
    matrices = 2 if own.gate is not None else 1
    biases = sum(b is not None for b in (own.gate_bias, own.up_bias))
    reads.sizes.update(up=matrices * own.hidden + biases, down=own.hidden, bias=0 if own.down_bias is None else own.hidden)
    activations, project = own.activations, own.project
    if "ridge" in layer.parts.tensors:
        reads.sizes["predictor"] = layer.parts.tensors["ridge"][0].numel()
    last: list = []

    def counted_activations(expert, x, neurons=slice(None)):
        ids = range(own.width)[neurons] if isinstance(neurons, slice) else neurons.tolist()
        tokens = [now[1][key(row)] for row in x]
        reads.up |= {(t, expert, n) for t in tokens for n in ids}
        last[:] = tokens
        return activations(expert, x, neurons)

    def counted_project(expert, a, neurons=slice(None)):
        reads.down |= {(t, expert, n) for t in last for n in range(own.width)[neurons]}
        reads.bias |= {(t, expert) for t in last}
        return project(expert, a, neurons)

    def run(x, index, weight):
        now[:] = [reads, {key(row): t for t, row in enumerate(x)}]
        assert len(now[1]) == len(x), "two rows of the batch are equal: they cannot be told apart"
        return layer(x, index, weight)

    way = layer.executor.way
    own.activations, own.project, layer.executor.way = counted_activations, counted_project, "reference"
    own.install(run)
    try:
        yield
    finally:
        del own.activations, own.project
        layer.executor.way = way
        own.install(layer)


def expected(elastic, tokens: int, found: list[Reads]) -> tuple[float, float]:
    """(bytes per token, distinct bytes) of what was counted."""
    size = elastic.stored_bytes_per_weight
    per_token = sum(reads.weights(distinct=False) for reads in found) * size / tokens
    return per_token, sum(reads.weights(distinct=True) for reads in found) * size


def distinct_rows(model, tokens: int) -> torch.Tensor:
    """[1, tokens] token ids, all different."""
    return torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(0))[None, :tokens]


def passing(seen) -> tuple[int, int]:
    """(weights read by all tokens, by the batch together) where neurons with a small gate are left out; and that this was computed.

    seen: (layer, x, index, weight, settled, (output, ...)) of every layer. What chooses blocks, and makes up for those that are dropped,
    is counted where any are.
    """
    per_token = distinct = 0
    for layer, x, index, weight, settled, (out, *_) in seen:
        own, block = layer.parts.layer, layer.parts.block
        wanted, read = torch.zeros_like(x), set()
        for t, c in ((t, c) for t in range(len(x)) for c in range(index.shape[1])):
            e, kept = int(index[t, c]), settled.keep[t, c].repeat_interleave(block)
            gate = torch.nn.functional.silu(own.gate[e] @ x[t])
            passes = (gate.abs() >= settled.cutoff[t]) & kept
            wanted[t] += weight[t, c] * (own.down[e] @ (gate * (own.up[e] @ x[t]) * passes))
            per_token += own.hidden * (int(kept.sum()) + 2 * int(passes.sum()))
            read |= {(e, n, 2) for n in passes.nonzero().flatten().tolist()}
            read |= {(e, n, 1) for n in kept.nonzero().flatten().tolist()}
        distinct += own.hidden * sum(matrices for *_, matrices in read)
        if not bool(settled.keep.all()):
            per_token += index.numel() * layer.scorer("ridge").parameters_per_expert()
            per_token += int((~settled.keep).sum()) * layer.compensator.parameters()[0]
            distinct = math.nan
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    return per_token, distinct

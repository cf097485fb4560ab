"""A model whose experts are planes in a store: a slot's width says which of them it reads.

Everything runs on the experts as they were encoded: what reads a slot as the model has it gets all bits of the file.
Shapes: T tokens, k experts per token, E experts, N sub-experts per expert, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..compress.changes import change_of
from ..compress.codec.nested import Nested
from ..compress.quantize import QuantizeChange
from ..elastic.base import LayerParts
from ..elastic.coded import SOURCE, codec_of
from ..elastic.execute.base import Candidates, Executor, Settled
from ..elastic.planes import UPPER
from ..errors import UsageError
from ..offload.base import Key
from ..point import OperatingPoint, SlotBits, WeightChange
from .choose_misses import Misses, rare, up_to
from .layer import StoredElastic, StoredNeurons
from .plane_layout import PlaneLayout
from .plane_store import PlaneStore
from .plane_wanted import PlaneWanted
from .read_ahead import Guess, ReadAhead


class GatesInPlanes:
    """What slots are chosen by: the gate neurons, which lie in memory, as they would be read at a width (`coded.CodedLayer`)."""

    def __init__(self, parts: LayerParts, bits: SlotBits) -> None:
        self.parts, self.bits = parts, bits
        self._at: dict[float, LayerParts] = {}

    def choosing(self, bits: float) -> LayerParts:
        """Parts with gate neurons at a width. A group of weights lies within a row, so rows are encoded as those of whole experts are."""
        layer = self.parts.layer
        if bits == SOURCE or not self.parts.gates or not isinstance(layer, StoredNeurons):
            return self.parts
        if bits not in self._at:
            codec, own = codec_of(self.bits.widths), dict(layer.tensors)
            for name in own.keys() & {"gate", "up"}:
                planes = codec.encode(own[name], self.bits.widths[-1], self.bits.group)
                own[name] = codec.decode(planes, bits).to(own[name].dtype)
            self._at[bits] = replace(self.parts, layer=StoredNeurons(layer.layer, own))
        return self._at[bits]

    def at(self, bits: float) -> LayerParts:
        raise NotImplementedError("points that compute all experts to choose are refused")


class FromPlanes(Executor):
    """Has the store compute what is kept, at the width that the rule says. A plane that is missing may be left out (`Misses`)."""

    def __init__(self, parts: LayerParts, elastic: PlaneElastic) -> None:
        self.parts, self.elastic, self.store = parts, elastic, elastic.planes
        self.number = parts.layer.index
        layout = self.store.pack.layout
        assert isinstance(layout, PlaneLayout)
        self.bits = float(layout.bits)

    def always_selects(self, tokens: int | None = None) -> bool:
        return not self.elastic.misses.is_exact(tokens)

    def coded(self, bits: SlotBits) -> GatesInPlanes:
        return GatesInPlanes(self.parts, bits)

    def settle(self, candidates: Candidates) -> Settled:
        asked, misses = candidates.widths(), self.elastic.misses
        floor, widths = misses.floor, self._at(asked, candidates, 1.0)
        sure = widths
        if misses.shares is not None:
            few, some = (up_to(candidates.weight, share) for share in misses.shares)
            sure = torch.where(few, widths, widths.clamp(max=float(UPPER)) * some)
        elif floor < 1:
            sure = self._at(candidates.widths(floor), candidates, floor)
        if misses.has_rare(len(widths)):
            index = candidates.index
            few = rare(index, (widths > 0).any(2), self.parts.layer.num_experts, misses.prompt_rate)
            sure = torch.where(few[index.clamp(0, len(few) - 1)][:, :, None], sure.clamp(max=float(UPPER)), sure)
        if sure is not widths:
            widths = self._affordable(candidates.index, widths, sure)
        return Settled(widths > 0, prepared=widths, widths=None if asked is None else widths)

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        layer = self.parts.layer
        wanted = PlaneWanted.of(index, weight, settled.prepared, layer.num_experts)
        out = self.store.run(
            self.number, x, wanted, meanwhile=lambda: self.elastic.ahead(self.number + 1, x, index)
        ).to(x.dtype)  # fmt: skip
        if layer.down_bias is not None:
            bias = layer.down_bias[index.clamp(0, layer.num_experts - 1)]
            out += (bias * (weight * settled.keep.any(2))[:, :, None]).sum(1)
        return out

    def run_at(self, coded: object, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        return self.run(x, index, weight, settled)

    def widths(self, candidates: Candidates, most: float) -> Tensor:
        """[T, k, N] float32: what the rule says at a budget of at most `most`."""
        return self._at(candidates.widths(most), candidates, most)

    def _at(self, asked: Tensor | None, candidates: Candidates, most: float) -> Tensor:
        """The same, of what it said; all bits where it knows none."""
        found = candidates.keep(most) * self.bits if asked is None else asked.clamp(max=self.bits)
        return torch.minimum(found, self.most(candidates.index))

    def most(self, index: Tensor) -> Tensor:
        """[T, k, 1]: the bits that a point gives to these experts at most (`PlaneElastic.expert_bits`)."""
        own = self.elastic.expert_bits
        if own is None:
            return torch.full((*index.shape, 1), self.bits)
        return own[self.number][index.clamp(0, self.parts.layer.num_experts - 1)][:, :, None]

    def _affordable(self, index: Tensor, wide: Tensor, sure: Tensor) -> Tensor:
        """The wider of both that needs no read; `sure` where that is wider still."""
        there = torch.from_numpy(self.store.resident(self.number).reshape(self.parts.layer.num_experts, -1, 2))
        upper, lower = there[index.clamp(0, len(there) - 1)].unbind(-1)
        free = torch.where(lower, wide, wide.clamp(max=float(UPPER)))
        return torch.where(upper, torch.maximum(free, sure), sure)


class PlaneElastic(StoredElastic):
    """`StoredElastic` over planes."""

    def __init__(
        self,
        model: object,
        layer_parts: Sequence[LayerParts],
        store: PlaneStore,
        *,
        misses: Misses,
        ahead: Guess,
        expert_bits: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """expert_bits: of every layer what its experts are read at, at most; None: all that the records have."""
        if misses.low is not None:
            raise UsageError(
                "planes have no int8 form beside them", "leave --int8-budget out; --miss-floor and --miss-shares work"
            )
        self.planes = store
        self.expert_bits = None if expert_bits is None else [torch.tensor(own, dtype=torch.float32) for own in expert_bits]
        """[E] of every layer; a point that says its own goes before."""
        super().__init__(model, layer_parts, store, misses=misses, ahead=Guess())
        self.ahead = PlanesAhead(self.layers, store, ahead)

    def executor_of(self, parts: LayerParts) -> Executor:
        return FromPlanes(parts, self)

    def check_weights(self, part: WeightChange) -> None:
        """Experts in nested planes at widths of their own are there, in the planes that the records begin with."""
        change, layout = change_of(part), self.planes.pack.layout
        assert isinstance(layout, PlaneLayout)
        if not isinstance(change, QuantizeChange):
            super().check_weights(part)
        assert isinstance(change, QuantizeChange)
        bits = {bits for own in change.widths(self.source_layers()) for bits in own}
        all_bits, nested = max(bits) == min(bits) == layout.bits, Nested(base=layout.base)
        held = change.codec in (
            replace(nested, most=layout.bits),
            *([nested] if all_bits else []),
        )  # of fewer bits cells are others
        if not held or change.group != layout.group or SOURCE in bits:
            raise UsageError(
                f"the point stores experts by '{change.codec.name}' in groups of {change.group}; the records have nested planes of "
                f"{layout.base} to {layout.bits} bits in groups of {layout.group}",
                f"make the point for these records, for example by edge-moe:codec=nested:widths=4-8:group={layout.group}",
            )

    def _enter_change(self, stack: ExitStack, part: WeightChange) -> None:
        change = change_of(part)
        if not isinstance(change, QuantizeChange):
            return super()._enter_change(stack, part)
        stack.callback(setattr, self, "expert_bits", self.expert_bits)
        self.expert_bits = [torch.tensor(own) for own in change.widths(self.source_layers())]
        return None

    def check_bits(self, point: OperatingPoint) -> None:
        bits, layout = point.slots.bits, self.planes.pack.layout
        assert isinstance(layout, PlaneLayout) and bits is not None
        own = (int(bits.widths[0]), int(bits.widths[-1]), bits.group)
        if own != (layout.base, layout.bits, layout.group):
            raise UsageError(
                f"slots of {own[0]} to {own[1]} bits in groups of {own[2]}; the records have {layout.base} to {layout.bits} in "
                f"groups of {layout.group}",
                "write records for this point, or choose one for these records",
            )


class PlanesAhead(ReadAhead):
    """Guesses planes, not only sub-experts."""

    def keys(self, number: int, x: Tensor, misses: Misses) -> Sequence[Key]:
        layer, first = self.layers[number], self.store.space.of_layer(number).start
        weight, index = self.experts(number, x)
        found = layer.candidates(layer.elastic.step, x, index, weight, state={})
        executor = layer.executor
        assert isinstance(executor, FromPlanes)
        if found is None:
            widths = executor.most(index).expand(-1, -1, layer.parts.n_sub)
        else:
            index, weight, widths = found.index, found.weight, executor.widths(found, misses.floor)
        records = PlaneWanted.of(index, weight, widths, layer.parts.layer.num_experts).records(first)
        return records.by_importance(0, len(records))[0][: self.width]

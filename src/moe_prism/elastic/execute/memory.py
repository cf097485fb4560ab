"""The executor of a model in memory: one of several ways to compute, repaired where the artefact is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...model.base import is_expert
from ..base import LayerParts
from ..coded import SOURCE
from ..compensate import Compensator
from ..repair import Repaired
from ..side_tensors import REPAIR
from . import triton_run
from .above import above
from .base import Again, Executor, Settled, WholeCalls
from .plain import grouped, reference, whole_experts
from .scaled import scaled
from .stored import FEW_ROWS, StoredExperts

if TYPE_CHECKING:
    from ..coded import CodedLayer
    from ..select import Selection
    from .one_call import LayerCall, Ready
    from .times import LayerTimes

Way = Callable[..., Tensor]
NARROW = (torch.float32, torch.bfloat16, torch.float16)
MOSTLY = 0.75  # kept share from which on one product of whole experts takes less time than N of blocks


@cache
def _compiled() -> tuple[ModuleType, ModuleType, ModuleType]:
    """What compiles when it is imported: one_call, tiled and times. An import statement in every call would cost more."""
    from . import one_call, tiled, times

    return one_call, tiled, times


def auto(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tally: WholeCalls | None = None) -> Tensor:
    """The fastest way that fits the layer. Shapes as in `plain.reference`."""
    if x.is_cuda:
        return triton_run.deterministic(parts, x, index, weight, keep)
    one_call, tiles, _ = _compiled()
    tally = tally or WholeCalls()
    tally.calls += 1
    if one_call.batch_products.usable(parts, x) is None:
        return _vectorised(parts, x, index, weight, keep, tally)
    if _whole_is_faster(parts, x, index, keep):
        tally.whole += 1
        own = parts.layer.input_dtype
        return whole_experts(parts, x.to(own), index, weight.to(own), keep)
    out: Tensor | None = tiles.tiled(parts, x, index, weight, keep)
    return _vectorised(parts, x, index, weight, keep, tally) if out is None else out


def _whole_is_faster(parts: LayerParts, x: Tensor, index: Tensor, keep: Tensor) -> bool:
    """Whether the model's own function takes less time for all slots than the tiles for those that are kept."""
    _, _, measured = _compiled()
    if measured.forced() != "measure":
        return False
    times: LayerTimes = measured.times_of(parts, len(x), index.shape[1])
    return times.stock < times.half or (times.stock < times.tiles and times.stock < times.kept(float(keep.float().mean())))


def _vectorised(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tally: WholeCalls) -> Tensor:
    """Where no tile can be used: N products of blocks, or one of whole experts where that multiplies fewer, larger matrices."""
    if keep.float().mean() < MOSTLY:
        return grouped(parts, x, index, weight, keep)
    tally.whole += 1
    return whole_experts(parts, x, index, weight, keep)


WAYS: Mapping[str, Way] = {
    "auto": auto,
    "grouped": grouped,
    "reference": reference,
    "triton": triton_run.deterministic,
    "triton-atomic": triton_run.atomic,
}


class InMemory(Executor):
    """The weights are the model's own. way: a name of WAYS."""

    skips_neurons = True

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self._way = "auto"
        self._decided: dict[tuple[int, int], LayerTimes | str] = {}
        self._stored: tuple[Any, Sequence[Any]] = (None, ())
        self._built: tuple[Sequence[Any], StoredExperts | None] = ((), None)
        self.forget()

    def forget(self) -> None:
        self.repaired = Repaired(self.parts) if REPAIR in self.parts.tensors else None

    @property
    def way(self) -> str:
        return self._way

    @way.setter
    def way(self, name: str) -> None:
        self._way = name
        for parts in (self.parts, self.parts.whole):
            if parts is not None:
                parts.ready = None  # what was remembered was of another way

    def widened(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The compiled jobs multiply float32 rows with weights as they are stored: that loses nothing, and no copy is made of a weight."""
        if x.dtype is torch.float32 and weight.dtype is torch.float32:
            return x, weight
        if self.way != "auto" or not x.is_cpu or x.dtype not in NARROW:
            return x, weight
        wide = x.float()
        return (x, weight) if _compiled()[0].batch_products.usable(self.parts, wide) is None else (wide, weight.float())

    def whole(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """From planes for few rows, where weights are stored so; by the tiles where they are faster (`times.py`), else by the model's own
        function.
        """
        rows, factors = self.widened(x, weight)
        out = self._from_stored(rows, index, factors)
        if out is not None:
            return out.to(x.dtype)
        out = self._whole_by_tiles(rows, index, factors) if x.is_cpu and rows.dtype == torch.float32 else None
        return self.parts.layer.native(x, index, weight) if out is None else out.to(x.dtype)

    def take(self, codec: Any, parts: Sequence[Any]) -> None:
        self._stored = codec, parts

    def _from_stored(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        codec, parts = self._stored
        if codec is None or not 0 < len(x) <= FEW_ROWS or self.way != "auto" or _compiled()[2].forced() == "stock":
            return None
        if self._built[0] is not parts:
            self._built = parts, StoredExperts.of(self.parts.layer, codec, parts)
        built = self._built[1]
        return None if built is None else built(x, index, weight)

    def _whole_by_tiles(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        if self.way != "auto":
            return None
        one_call, tiles, measured = _compiled()
        if not len(x) or one_call.batch_products.usable(self.parts, x) is None or not self._whole_fits(*index.shape):
            return None
        whole = measured.whole_parts(self.parts)
        out: Tensor | None = one_call.given(whole, x, index, weight, None)
        if out is None:
            chosen = is_expert(index, self.parts.layer.num_experts).unsqueeze(2)
            out = tiles.tiled(whole, x, index, weight, chosen)
        return out

    def _times(self, tokens: int, k: int) -> LayerTimes | str:
        """How long the layer takes, or who was named to compute whole experts; asked for once."""
        found = self._decided.get((tokens, k))
        if found is None:
            _, _, measured = _compiled()
            word = measured.forced()
            found = self._decided[tokens, k] = measured.times_of(self.parts, tokens, k) if word == "measure" else word
        return found

    def _whole_fits(self, tokens: int, k: int) -> bool:
        """Whether the tiles compute whole experts."""
        times = self._times(tokens, k)
        return times == "tiles" if isinstance(times, str) else times.tiles_win

    def _kept_fits(self, tokens: int, k: int) -> bool:
        """Whether the tiles compute kept slots, however many."""
        times = self._times(tokens, k)
        return self.way == "auto" and (isinstance(times, str) or times.tiles_serve)

    def at_once(self, selection: Selection, extra: Compensator | None) -> tuple[Tensor, Tensor] | None:
        """By `one_call`, unless whole experts may take less time."""
        x, index, weight, held = selection.x, selection.index, selection.weight, selection.held
        call = self._call(selection, extra) if held is None or held.own is None else None
        if call is None or not (call.ready.takes(x, index, weight) and self._kept_fits(*index.shape)):
            return None
        budget, past = call.budget(selection.budget, len(x)), 0 if held is None else held.past.address
        if budget is None:
            return None
        keep = torch.empty((*index.shape, selection.n_sub), dtype=torch.bool)
        out = call(x, index, weight, budget, past, keep)
        if out is None:
            return None
        self.tally.calls += 1
        return out, keep

    def _call(self, selection: Selection, extra: Compensator | None) -> LayerCall | None:
        if self.way != "auto" or self.repaired is not None or not selection.x.is_cpu:
            return None
        found: Ready | None = _compiled()[0].ready(self.parts, selection.x)
        return None if found is None else found.call(selection, extra)

    def again(self, selection: Selection | None, extra: Compensator | None) -> Again | None:
        """By `one_call`."""
        one_call, _, measured = _compiled()
        if selection is None and self._stored[0] is not None:
            return None
        if selection is None:
            whole = measured.whole_parts(self.parts).ready
            return None if whole is None else one_call.AtFull(whole, self._whole_fits)
        call = self._call(selection, extra)
        if call is None or isinstance(selection.budget, Tensor):
            return None
        held, budget = selection.held is not None, call.budget(selection.budget, 1)
        return one_call.AtPoint(call, budget, held, self._kept_fits, self.tally)  # type: ignore[no-any-return]

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        execute = partial(auto, tally=self.tally) if self.way == "auto" else WAYS[self.way]
        if self.repaired is None:
            return execute(self.parts, x, index, weight, settled.keep)
        return self.repaired(execute, x, index, weight, settled.keep)

    def run_above(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> tuple[Tensor, Tensor, Tensor]:
        return above(self.parts, x, index, weight, settled)

    def run_scaled(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        return scaled(self.parts, x, index, weight, settled)

    def run_at(self, coded: CodedLayer, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        assert settled.widths is not None
        return coded.run(self._at_width, x, index, weight, settled.widths)

    def _at_width(self, coded: CodedLayer, bits: float, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        """Slots at one width: from planes as they lie, or of weights that are written out."""
        slots = x, index, weight, keep
        out = self._from_planes(coded, int(bits), slots) if coded.packed and bits != SOURCE else None
        if out is not None:
            self.tally.calls += 1
            return out
        parts = coded.at(bits)
        return auto(parts, *slots, self.tally) if self.way == "auto" else WAYS[self.way](parts, *slots)

    def _from_planes(self, coded: CodedLayer, bits: int, slots: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor | None:
        if self.way not in ("auto", "triton"):
            return None
        if slots[0].is_cuda or self.way == "triton":
            if len(coded.packed) < len(("gate", "up", "down")):
                return None
            gate, up, down = coded.packed
            return triton_run.from_planes(coded.parts, (gate, up, down, bits), *slots)
        from .from_planes import from_planes  # compiles on first use

        return from_planes(coded.parts.layer, coded.packed, bits, slots)


def check_way(name: str) -> str:
    """UsageError for a way that does not exist."""
    if name not in WAYS:
        raise UsageError(f"unknown executor '{name}'", f"choose one of: {', '.join(WAYS)}")
    return name

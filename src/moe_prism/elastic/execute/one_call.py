"""A layer with few tokens in one compiled call (`kernels/whole_layer.py`), where layer, scorer and rule are of the compiled kind.

It gives what `tiled`, scorer, rule and compensation give one after the other, to the last bit. What a call needs to know is found once and
kept: between the attention of two layers, each object of Python's that is looked at is far from the processor. Shapes as in `base.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import block_jobs, threads
from ...kernels.whole_layer import CHOICE, WEIGHTS, run_chosen, run_given
from ..base import FEW, SMALL, LayerParts, is_compiled
from ..compensate import Compensator
from ..compensate.mean import Mean
from ..rules import top_slots
from ..scorers.ridge import CEILING, Ridge
from . import batch_products
from .base import WholeCalls
from .batch_products import Stored

if TYPE_CHECKING:
    from ..control import Past
    from ..select import Selection

MOST = 1 << 20  # pre-activations at most: beyond it, they would not be in the cache when they are used
CALLS = 64  # ways of choosing that are kept
Record = NDArray[Any]


class Ready:
    """A layer's weights as the compiled call reads them, as long as they lie there, and what was made ready to choose among them."""

    def __init__(self, parts: LayerParts, stored: Stored) -> None:
        layer, self.parts, self.stored = parts.layer, parts, stored
        self.most = min(max(FEW, SMALL // layer.hidden), MOST // (2 * layer.width))  # choices
        self.calls: dict[Any, LayerCall] = {}
        jobs: Any = block_jobs
        if stored.down.tensor.dtype != torch.float32:
            from ...kernels import block_jobs_bf16 as jobs  # compiles on first use
        self.first = np.array([part.cells(parts.block) for part in stored.first], np.int64)
        record = {"hidden": layer.hidden, "experts": layer.num_experts, "n_sub": parts.n_sub, "block": parts.block}
        record |= {"first": self.first.ctypes.data, "fork": threads.fork_address(), "worth": threads.ONE_THREAD_WORK}
        record |= {"down": stored.down.address, "down_expert": stored.down.expert, "down_row": stored.down.row}
        record |= {"dot_job": jobs.dot_job.address, "add_job": jobs.add_job.address}
        self.record = filled(WEIGHTS, record)
        self.address = self.record.ctypes.data

    def takes(self, x: Tensor, index: Tensor, weight: Tensor) -> bool:
        """Whether these are rows that the call can read where they are, and the weights still lie where they did."""
        return (
            x.dtype is torch.float32
            and weight.dtype is torch.float32
            and index.dtype is torch.int64
            and 0 < index.numel() <= self.most
            and x.is_cpu
            and x.is_contiguous()
            and index.is_contiguous()
            and weight.is_contiguous()
            and self.parts.ready is self
            and batch_products.usable(self.parts, x) is self.stored
        )

    def is_there(self, x: Tensor, index: Tensor, weight: Tensor) -> bool:
        """`takes` for rows of a step like one that was taken before: what can have changed since."""
        return (
            x.dtype is torch.float32
            and weight.dtype is torch.float32
            and x.is_contiguous()
            and index.is_contiguous()
            and weight.is_contiguous()
            and self.parts.ready is self
            and self.parts.layer.storage() == self.stored.key
            and not torch.is_grad_enabled()
        )

    def output(self, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor | None:
        """[T, d]: of the slots keep [T, k, N], None: of all. None where a token has an expert twice."""
        out, marks, (tokens, k) = torch.empty_like(x), 0 if keep is None else keep.data_ptr(), index.shape
        rows = x.data_ptr(), index.data_ptr(), weight.data_ptr(), tokens, k
        return out if run_given(self.address, *rows, marks, out.data_ptr(), torch.get_num_threads()) else None

    def call(self, selection: Selection, extra: Compensator | None) -> LayerCall | None:
        """What chooses as a selection does, and makes up for what is dropped; None where that is not compiled."""
        key = choice_key(selection, extra)
        found = self.calls.get(key)
        if found is None:
            if not is_compiled_choice(selection, extra):
                return None
            if self.stored.down.tensor.dtype not in (torch.float32, torch.bfloat16):
                return None
            if len(self.calls) == CALLS:
                self.calls.clear()
            found = self.calls[key] = LayerCall(self, selection, extra)
        return found


class ChoiceRecord:
    """How one scorer, rule and compensation choose a layer's slots, as compiled code reads it.

    weights: address of the layer's WEIGHTS; gates: per block; table [P, 6]: of the gate neurons, as `Ridge.gate_parts` names them.
    """

    def __init__(
        self, weights: int, gates: int, table: NDArray[np.int64], selection: Selection, extra: Compensator | None
    ) -> None:
        scorer, levels, held = selection.scorer, selection.rule.compiled, selection.held
        assert isinstance(scorer, Ridge) and levels is not None
        self._budgets: dict[float, NDArray[np.float32]] = {}
        scale, weight = scorer.scale.contiguous(), scorer.weight.contiguous()
        vectors = extra.vectors.contiguous() if isinstance(extra, Mean) else None
        record: dict[str, Any] = {"weights": weights, "gates": gates, "first": table.ctypes.data}
        record["dot_job"] = block_jobs.dot_job.address
        record |= {"predictor": weight.data_ptr(), "predictor_row": weight.shape[2], "scale": scale.data_ptr()}
        record |= {"cutoffs": levels.ctypes.data, "levels": len(levels), "ceiling": CEILING}
        record["vectors"] = 0 if vectors is None else vectors.data_ptr()
        if held is not None:
            holding = held.holding
            record |= {"tables": holding.tables.ctypes.data, "part": holding.weight, "strict": int(holding.strict)}
            record |= {"layer": held.layer, "mine": held.group}
        self.record = filled(CHOICE, record)
        self.address = self.record.ctypes.data
        self.alive = selection.rule, scorer, extra, held and held.holding, table, scale, weight, levels, vectors

    def budget(self, asked: float | Tensor, tokens: int, most: int) -> int | None:
        """The address of the dials [T]; None for a tensor of another kind. That of a number is kept, for up to `most` tokens."""
        if isinstance(asked, Tensor):
            return asked.data_ptr() if is_compiled(asked) and asked.is_contiguous() and asked.numel() == tokens else None
        if asked not in self._budgets:
            self._budgets[asked] = np.full(most, asked, np.float32)
        return self._budgets[asked].ctypes.data


def choice_key(selection: Selection, extra: Compensator | None) -> tuple[Any, ...]:
    """What tells ways of choosing apart."""
    held = selection.held
    return id(selection.rule), id(selection.scorer), id(extra), None if held is None else (id(held.holding), held.group)


def is_compiled_choice(selection: Selection, extra: Compensator | None) -> bool:
    """Whether compiled code chooses as a selection does, and makes up for what is dropped."""
    rule = selection.rule
    if rule.compiled is not None and not len(rule.compiled) and selection.index.shape[1] * selection.n_sub > top_slots.FEW:
        return False
    return type(selection.scorer) is Ridge and rule.compiled is not None and (extra is None or type(extra) is Mean)


class LayerCall:
    """A layer's slots chosen by one scorer and rule, computed and compensated."""

    def __init__(self, ready: Ready, selection: Selection, extra: Compensator | None) -> None:
        scorer = selection.scorer
        assert isinstance(scorer, Ridge)
        self.ready = ready
        table = np.array([part.cells(0) for part in scorer.gate_parts(ready.stored)], np.int64)
        self.choice = ChoiceRecord(ready.address, ready.parts.gates, table, selection, extra)
        self.address = self.choice.address

    def budget(self, asked: float | Tensor, tokens: int) -> int | None:
        """See `ChoiceRecord.budget`."""
        return self.choice.budget(asked, tokens, self.ready.most)

    def __call__(
        self, x: Tensor, index: Tensor, weight: Tensor, budget: int, past: int, keep: Tensor | None = None
    ) -> Tensor | None:
        """[T, d], and keep [T, k, N] where it is wanted; None, and nothing done, where a token has an expert twice."""
        out, (tokens, k) = torch.empty_like(x), index.shape
        rows = x.data_ptr(), index.data_ptr(), weight.data_ptr(), tokens, k
        marks = 0 if keep is None else keep.data_ptr()
        done = run_chosen(self.address, past, budget, *rows, marks, out.data_ptr(), torch.get_num_threads())
        return out if done else None


def ready(parts: LayerParts, x: Tensor) -> Ready | None:
    """A layer made ready; None where the compiled call cannot take it, or rows of this kind."""
    stored = batch_products.usable(parts, x)
    if stored is None:
        return None
    if parts.ready is None or parts.ready.stored is not stored:
        layer = parts.layer
        fits = layer.gate is not None and layer.up_bias is None and layer.down_bias is None and layer.is_silu
        if not fits:
            return None
        parts.ready = Ready(parts, stored)
    return parts.ready  # type: ignore[no-any-return]


def given(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor | None:
    """[T, d]: the output of the slots keep [T, k, N], None: of all. None where this cannot be one call."""
    found = ready(parts, x) if index.numel() else None
    if found is None or index.numel() > found.most:
        return None
    x, index, weight = x.contiguous(), index.contiguous(), weight.contiguous()
    keep = None if keep is None else keep.contiguous()
    return found.output(x, index, weight, keep) if found.takes(x, index, weight) else None


@dataclass(slots=True, eq=False)
class AtPoint:
    """A call for tokens that are all at one operating point. fits: says of (tokens, k) whether the tiles take the least time."""

    call: LayerCall
    budget: int
    holds: bool
    fits: Callable[[int, int], bool]
    tally: WholeCalls
    fitting: set[Any] = field(default_factory=set)  # shapes of index that were asked about

    def __call__(self, x: Tensor, weight: Tensor, index: Tensor, past: Past | None) -> Tensor | None:
        """The layer's output [T, d]; None where the parts have to be called."""
        call, shape = self.call, index.shape
        if shape not in self.fitting:
            if not (call.ready.takes(x, index, weight) and self.fits(*shape)):
                return None
            self.fitting.add(shape)
        if not call.ready.is_there(x, index, weight):
            return None
        at = 0
        if self.holds:
            if past is None or past.rows.shape[1] != shape[0]:
                return None
            at = past.address
        out = call(x, index, weight, self.budget, at)
        if out is not None:
            self.tally.calls += 1
        return out


@dataclass(slots=True, eq=False)
class AtFull:
    """Whole experts."""

    ready: Ready
    fits: Callable[[int, int], bool]
    fitting: set[Any] = field(default_factory=set)

    def __call__(self, x: Tensor, weight: Tensor, index: Tensor, past: Past | None) -> Tensor | None:
        """As `AtPoint`."""
        shape = index.shape
        if shape not in self.fitting:
            if not (self.ready.takes(x, index, weight) and self.fits(*shape)):
                return None
            self.fitting.add(shape)
        return self.ready.output(x, index, weight, None) if self.ready.is_there(x, index, weight) else None


def filled(kind: np.dtype[Any], values: dict[str, Any]) -> Record:
    """A record [1] of a kind, as compiled code reads it."""
    record = np.zeros(1, kind)
    for name, value in values.items():
        record[name] = value
    return record

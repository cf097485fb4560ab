"""A layer with few tokens in one compiled call (`kernels/whole_layer.py`), where layer, scorer and rule are of the compiled kind.

It gives what `tiled`, scorer, rule and compensation give one after the other, to the last bit. Shapes as in `base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import block_jobs, threads
from ...kernels.whole_layer import CHOICE, WEIGHTS, run_chosen, run_kept
from ..base import LayerParts, are_few, is_compiled
from ..compensate import Compensator
from ..compensate.mean import Mean
from ..rules.top_slots import FEW
from ..scorers.ridge import CEILING, Ridge
from .batch_products import Stored, usable
from .decode_products import like_of

if TYPE_CHECKING:
    from ..control import HeldRows
    from ..select import Selection

MOST = 1 << 20  # pre-activations at most: beyond it, they would not be in the cache when they are used
Numbers = NDArray[Any]


@dataclass(eq=False)
class Ready:
    """A layer's weights as the compiled call reads them, and the ways of choosing met so far, with what their addresses point into."""

    stored: Stored
    weights: Numbers
    like: Any
    choices: dict[Any, tuple[Numbers, Any]] = field(default_factory=dict)
    budgets: dict[float, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = self.weights.ctypes.data

    @classmethod
    def of(cls, parts: LayerParts, stored: Stored) -> Ready:
        layer, record = parts.layer, np.zeros(1, WEIGHTS)
        found = {"hidden": layer.hidden, "experts": layer.num_experts, "n_sub": parts.n_sub, "block": parts.block}
        for name, matrix in zip(("gate", "up", "down"), (*(p.matrix for p in stored.first), stored.down), strict=True):
            found |= {name: matrix.address, f"{name}_expert": matrix.expert, f"{name}_row": matrix.row}
        jobs: Any = block_jobs
        if stored.down.tensor.dtype != torch.float32:
            from ...kernels import block_jobs_bf16 as jobs  # compiles on first use
        found |= {"fork": threads.fork_address(), "worth": threads.ONE_THREAD_WORK}
        found |= {"dot_job": jobs.dot_job.address, "add_job": jobs.add_job.address}
        for name, value in found.items():
            record[name] = value
        return cls(stored, record, like_of(stored.down.tensor.dtype))

    def budget(self, asked: float | Tensor, tokens: int) -> int | None:
        """The address of the budgets [T]; None for a tensor of another kind."""
        if isinstance(asked, Tensor):
            return asked.data_ptr() if is_compiled(asked) and asked.is_contiguous() and asked.numel() == tokens else None
        known = self.budgets.get(asked)
        if known is None or len(known) < tokens:
            known = self.budgets[asked] = np.full(max(tokens, FEW), asked, np.float32)
        return known.ctypes.data

    def choice(self, selection: Selection, extra: Compensator | None) -> int:
        """The address of the CHOICE that a selection with ridge scorer and compiled rule makes, with the compensation that follows."""
        held = selection.held
        key = id(selection.rule), id(selection.scorer), id(extra), None if held is None else (id(held.holding), held.group)
        found = self.choices.get(key)
        if found is None:
            if len(self.choices) > FEW:
                self.choices.clear()
            found = self.choices[key] = _choice(self.stored, selection, extra, held)
        return found[0].ctypes.data


def _choice(stored: Stored, selection: Selection, extra: Compensator | None, held: HeldRows | None) -> tuple[Numbers, Any]:
    scorer, levels = selection.scorer, selection.rule.compiled
    assert isinstance(scorer, Ridge) and levels is not None
    parts, record = scorer.parts, np.zeros(1, CHOICE)
    table = scorer.gate_table(stored)
    scale, weight = scorer.scale.contiguous(), scorer.weight.contiguous()
    found = {"gates": parts.gates, "predictor": weight.data_ptr(), "predictor_row": weight.shape[2], "first": table.ctypes.data}
    found |= {"scale": scale.data_ptr(), "cutoffs": levels.ctypes.data, "levels": len(levels)}
    vectors = extra.vectors.contiguous() if isinstance(extra, Mean) else None
    if vectors is not None:
        found["vectors"] = vectors.data_ptr()
    if held is not None:
        holding = held.holding
        found |= {"tables": holding.tables.ctypes.data, "layer": held.layer, "mine": held.group, "strict": int(holding.strict)}
        record["part"] = holding.weight
    record["ceiling"] = CEILING
    for name, value in found.items():
        record[name] = value
    return record, (selection.rule, scorer, extra, held and held.holding, table, scale, weight, levels, vectors)


def ready(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor) -> Ready | None:
    """What the compiled call reads of a layer; None where it cannot take the layer or these rows."""
    if not (are_few(x, index) and is_compiled(weight) and index.dtype == torch.int64):
        return None
    stored = usable(parts, x)
    if stored is None:
        return None
    if parts.ready is None or parts.ready.stored is not stored:
        layer = parts.layer
        fits = layer.gate is not None and layer.up_bias is None and layer.down_bias is None and layer.is_silu
        parts.ready = Ready.of(parts, stored) if fits else None
        if parts.ready is None:
            return None
    return parts.ready if 2 * index.numel() * parts.layer.width <= MOST else None


def kept(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor | None:
    """[T, d]: the output of the slots keep [T, k, N], None: of all. None where this cannot be one call."""
    found = ready(parts, x, index, weight)
    if found is None:
        return None
    x, index, weight = x.contiguous(), index.contiguous(), weight.contiguous()
    keep = None if keep is None else keep.contiguous()
    out = torch.empty(x.shape)
    marks = 0 if keep is None else keep.data_ptr()
    rows = x.data_ptr(), index.data_ptr(), weight.data_ptr(), *index.shape
    return out if run_kept(found.address, *rows, marks, out.data_ptr(), torch.get_num_threads(), found.like) else None


def chosen(parts: LayerParts, selection: Selection, extra: Compensator | None) -> tuple[Tensor, Tensor] | None:
    """(output [T, d] with what makes up for dropped slots, keep [T, k, N]); None, and nothing done, where this cannot be one call."""
    rule, x, index, weight, held = selection.rule, selection.x, selection.index, selection.weight, selection.held
    if rule.compiled is None or type(selection.scorer) is not Ridge or not (extra is None or type(extra) is Mean):
        return None
    if not len(rule.compiled) and index.shape[1] * parts.n_sub > FEW:
        return None
    found = ready(parts, x, index, weight)
    if found is None or (held is not None and held.own is not None):
        return None
    tokens, k = index.shape
    budget = found.budget(selection.budget, tokens)
    if budget is None:
        return None
    x, index, weight = x.contiguous(), index.contiguous(), weight.contiguous()
    keep, out = torch.empty((tokens, k, parts.n_sub), dtype=torch.bool), torch.empty(x.shape)
    past = 0 if held is None else held.past.address
    rows = x.data_ptr(), index.data_ptr(), weight.data_ptr(), budget, tokens, k, keep.data_ptr(), out.data_ptr()
    done = run_chosen(found.address, found.choice(selection, extra), past, *rows, torch.get_num_threads(), found.like)
    return (out, keep) if done else None

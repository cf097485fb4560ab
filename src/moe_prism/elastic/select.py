"""Selection: which candidate slots of a batch are kept. It exists once, in a plain form and in a fused one that gives the same.

Shapes: T tokens, k experts per token, N sub-experts per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from ..model.base import is_expert
from ..routing.base import Factors
from .base import Rule, Scorer, Slots, are_few
from .coded import SOURCE
from .control import HeldRows, keep_held
from .fused_select import budgets_of, prepared, run, select_few
from .rules.threshold import Threshold
from .rules.widths import WidthRule

if TYPE_CHECKING:
    from ..kernels.selection import Held


def nothing() -> None:
    """No experts beside those that are weights."""


@dataclass(eq=False)
class Selection:
    """The candidate slots of a batch and the rule that chooses among them. Nothing is computed before it is asked for.

    x [T, d]; index, weight [T, k], with ids outside [0, E) where there is no expert; budget: one number, or one per token [T]. held: what
    the requests' budgets are held with; to choose then moves their state on, so it is done once.
    """

    x: Tensor
    index: Tensor
    weight: Tensor
    experts: int
    n_sub: int
    rule: Rule
    scorer: Scorer | None  # None where the rule needs no norms
    budget: float | Tensor
    added: Callable[[], Tensor | None] = nothing  # [T, d]: of experts that are not weights
    held: HeldRows | None = None
    cutoff: Tensor | None = None  # [T]: of the gates of neurons, as in `Routed`
    factors: Factors | None = None  # as in `Routed`
    _chosen: tuple[Tensor, Tensor] | None = None  # keep, and the budget that each token reached

    @cached_property
    def valid(self) -> Tensor:
        """[T, k] bool: where there is an expert."""
        return is_expert(self.index, self.experts)

    @cached_property
    def slots(self) -> Slots:
        """What a rule sees."""
        return Slots(self.x, self.index, self.weight, self.valid, self.n_sub, self._norms)

    def _norms(self) -> Tensor:
        if self.scorer is None:
            raise RuntimeError("a rule that says it needs no norms has asked for them")
        return self.scorer(self.x, self.index.clamp(0, self.experts - 1))

    def values(self) -> Tensor:
        """[T, k, N]: what each slot is worth, -1 where there is no expert."""
        if self.scorer is None:
            return (
                self.slots.weight.float().abs()[:, :, None].expand(-1, -1, self.n_sub).masked_fill(~self.valid[:, :, None], -1.0)
            )
        return self.slots.values()

    def widths(self, most: float = 1.0) -> Tensor | None:
        """[T, k, N]: bits of every slot, 0 where it is dropped; None where the rule knows no bits. most: as of `keep`."""
        if not isinstance(self.rule, WidthRule):
            return None
        return self.rule.widths(self.slots, _per_token(self.budget if most >= 1 else _least(self.budget, most), self.x))

    def keep(self, most: float = 1.0) -> Tensor:
        """keep [T, k, N] bool; most: a budget that no token may pass, whatever its own."""
        if self.held is None:
            return self._kept(self.budget if most >= 1 else _least(self.budget, most))
        keep, reached = self._hold(self.held)
        return keep if most >= 1 else keep & self.rule.keep(self.slots, reached.clamp(max=most))

    def _kept(self, budget: float | Tensor) -> Tensor:
        if self.scorer is not None and are_few(self.x, self.index):
            found = select_few(self.scorer, self.rule, self.x, self.index, self.weight, budget)
            if found is not None:
                return found
        return self.rule.keep(self.slots, _per_token(budget, self.x))

    def _hold(self, held: HeldRows) -> tuple[Tensor, Tensor]:
        """(keep, the budget that each token reached)."""
        if self._chosen is None:
            found = self.fused(())
            if found is not None:
                self._chosen = run(*found), torch.from_numpy(found[2][0])
            else:
                budget = _per_token(self.budget, self.x)
                assert isinstance(self.rule, Threshold)  # no other rule says that it holds budgets
                self._chosen = keep_held(self.values(), self.rule.cutoffs, budget, self.valid, held.arrays)
        return self._chosen

    def fused(self, most: Sequence[float]) -> tuple[Any, Held | None, NDArray[np.float32]] | None:
        """What `kernels.selection.select` wants to know, with the budgets [1 + B, T]: the tokens' own, then capped at each of `most`.

        None where scorer, rule or batch are not of the compiled kind.
        """
        if self.scorer is None or not are_few(self.x, self.index):
            return None
        budgets = budgets_of([self.budget] * (1 + len(most)), len(self.x))
        found = None if budgets is None else prepared(self.scorer, self.rule, self.x, self.index, self.weight)
        if budgets is None or found is None:
            return None
        for budget, limit in zip(budgets[1:], most, strict=True):
            np.minimum(budget, np.float32(limit), out=budget)
        return found, None if self.held is None else self.held.arrays, budgets


@dataclass(frozen=True)
class Whole:
    """A batch whose experts are all computed whole: the selection where there is nothing to select."""

    index: Tensor
    weight: Tensor
    valid: Tensor
    n_sub: int
    added: Callable[[], Tensor | None] = nothing
    cutoff: Tensor | None = None  # as in `Selection`
    factors: Factors | None = None

    def values(self) -> Tensor:
        """[T, k, N]: the routing weight of every slot, -1 where there is no expert."""
        size = self.weight.float().abs()[:, :, None].expand(-1, -1, self.n_sub)
        return size.masked_fill(~self.valid[:, :, None], -1.0)

    def widths(self, most: float = 1.0) -> None:
        return None

    def keep(self, most: float = 1.0) -> Tensor:
        return self.valid[:, :, None].expand(-1, -1, self.n_sub).contiguous()

    def fused(self, most: Sequence[float]) -> None:
        return None


@dataclass(frozen=True)
class Mixed:
    """The selections of parts of a batch as one. rows [S] of each part; of a device's points rows is a mask [T], which asks it nothing."""

    parts: Sequence[tuple[Tensor, Selection | Whole]]
    index: Tensor
    weight: Tensor
    n_sub: int

    def values(self) -> Tensor:
        return self._joined([part.values() for _, part in self.parts], -1.0)

    def widths(self, most: float = 1.0) -> Tensor | None:
        """Parts whose rule knows no bits are read as they are stored."""
        found = [part.widths(most) for _, part in self.parts]
        if all(own is None for own in found):
            return None
        every = zip(found, self.parts, strict=True)
        return self._joined([part.keep(most).float() * SOURCE if own is None else own for own, (_, part) in every], 0.0)

    def keep(self, most: float = 1.0) -> Tensor:
        return self._joined([part.keep(most) for _, part in self.parts], False)

    def fused(self, most: Sequence[float]) -> None:
        return None

    @property
    def cutoff(self) -> Tensor | None:
        """[T]: of the parts, 0 where a part has none; None where no part has any."""
        if all(part.cutoff is None for _, part in self.parts):
            return None
        out = torch.zeros(len(self.index), device=self.index.device)
        for rows, part in self.parts:
            if part.cutoff is not None:
                put(out[:, None], rows, part.cutoff[:, None])
        return out

    @property
    def factors(self) -> Factors | None:
        """Of the parts; a token of a part that has none multiplies nothing."""
        first = next((part.factors for _, part in self.parts if part.factors is not None), None)
        if first is None:
            return None
        out = Factors(*(value.new_zeros(len(self.index), *value.shape[1:]) for value in first.tensors))
        for rows, part in self.parts:
            if part.factors is not None:
                for whole, own in zip(out.tensors, part.factors.tensors, strict=True):
                    put(whole.view(len(whole), -1), rows, own.view(len(own), -1))
        return out

    def added(self) -> Tensor | None:
        """[T, d]: what experts that are not weights add to some of the tokens; None where no part has any."""
        out: Tensor | None = None
        for rows, part in self.parts:
            own = part.added()
            if own is not None:
                out = own.new_zeros(len(self.index), own.shape[1]) if out is None else out
                put(out, rows, own)
        return out

    def _joined(self, found: Sequence[Tensor], nothing: float) -> Tensor:
        out = torch.full((*self.index.shape, self.n_sub), nothing, dtype=found[0].dtype, device=self.index.device)
        for (rows, _), own in zip(self.parts, found, strict=True):
            put(out, rows, own)
        return out


def joined(parts: Sequence[tuple[Tensor, Selection | Whole]], index: Tensor, weight: Tensor, n_sub: int) -> Mixed:
    """Parts of a batch as one; index, weight [T, k]: of the whole batch before, for their types and places."""
    width = max(part.index.shape[1] for _, part in parts)
    ids, sizes = index.new_full((len(index), width), -1), weight.new_zeros(len(index), width)
    for rows, part in parts:
        put(ids, rows, part.index)
        put(sizes, rows, part.weight.to(sizes.dtype))
    return Mixed(parts, ids, sizes, n_sub)


def put(out: Tensor, rows: Tensor, own: Tensor) -> None:
    """Write the rows of a part into those of the batch; a part may have fewer choices than the batch. rows: ids [S], or a mask [T]."""
    wide = out[:, : own.shape[1]]
    if rows.dtype == torch.bool:
        wide.copy_(torch.where(rows.view(-1, *[1] * (own.ndim - 1)), own, wide))
    else:
        wide[rows] = own


def _least(budget: float | Tensor, most: float) -> float | Tensor:
    return budget.clamp(max=most) if isinstance(budget, Tensor) else min(budget, most)


def _per_token(budget: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(budget, Tensor):
        return torch.full((x.shape[0],), float(budget), device=x.device)
    if budget.numel() != x.shape[0]:
        raise UsageError(f"{budget.numel()} budgets for {x.shape[0]} tokens", "give one per token of the flattened batch")
    return budget.reshape(-1).to(x.device, torch.float32)

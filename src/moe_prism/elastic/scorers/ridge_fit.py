"""The least squares behind the `ridge` scorer: a penalty of several strengths, of which held-out rows choose one.

`exact_fit` is the readable form, all of it in float64. Systems of LARGE unknowns or more are factorised in float32 (`fast_fit`), which is a
quarter of the work, and what that rounds off is put right with products of the rows in float64 until it is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared feature; the best on a held-out fifth of the sample is used
MIN_TOKENS = 16  # below this only the mean is known
LARGE = 512  # unknowns; smaller systems take no time
WRONG_BY = 1e-9  # what a corrected solution may still be wrong by, relative to itself
CORRECTIONS = 4  # that are tried
BLOCK = 256  # rows of products of which only one triangle is computed


def held_out(rows: int) -> Tensor:
    """Which of an expert's sampled rows choose the strength of the penalty, and show what is predicted of unseen ones: every fifth."""
    return torch.arange(rows)[4::5] if rows >= MIN_TOKENS else torch.arange(rows)


def ridge_fit(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [D, N] of the least-squares fit y ~ z with the strength that does best on `held_out` rows, and their predictions.

    z [S, D] ends with a constant, which is not penalised; both are float64. What is predicted is what `exact_fit` predicts, to 1e-7.
    """
    out = held_out(len(z)).to(z.device)
    if len(z) < MIN_TOKENS:
        constant = torch.zeros(z.shape[1], y.shape[1], dtype=z.dtype, device=z.device)
        constant[-1] = y.mean(0)
        return constant, y.mean(0).expand(len(out), -1)
    if min(len(z), z.shape[1] - 1) >= LARGE and (found := fast_fit(z, y, out)) is not None:
        return found
    return exact_fit(z, y, out)


def exact_fit(z: Tensor, y: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`ridge_fit` in float64."""
    whole = _Rows.of(z[:, :-1], y)
    train = whole.without(out)
    tried = [z[out] @ train.solve(s) for s in STRENGTHS]
    best = _best(tried, y[out])
    return whole.solve(STRENGTHS[best]), tried[best]


def fast_fit(z: Tensor, y: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same from factors in float32; None where rounding is too much for them, as of features that are nearly the same."""
    whole = _Single.of(z[:, :-1], y)
    train = whole.without(out)
    tried: list[Tensor] = []
    for strength in STRENGTHS[::-1]:  # the smallest is the one that may fail
        fit = train.solve(strength)
        if fit is None:
            return None
        tried.insert(0, z[out] @ fit)
    best = _best(tried, y[out])
    del train
    found = whole.solve(STRENGTHS[best])
    return None if found is None else (found, tried[best])


def _best(tried: Sequence[Tensor], wanted: Tensor) -> int:
    return int(torch.stack([((found - wanted) ** 2).sum() for found in tried]).argmin())


class _Rows(NamedTuple):
    """Rows [S, D - 1] and targets [S, N], and the products of the shorter side, not centred. The constant is not penalised.

    The products are most of the work. So those of a part of the rows are taken from those of all.
    """

    rows: Tensor
    targets: Tensor
    products: Tensor

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor) -> _Rows:
        return cls(rows, targets, rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows)

    @property
    def is_dual(self) -> bool:
        return len(self.rows) <= self.rows.shape[1]

    def without(self, out: Tensor) -> _Rows:
        """Of all rows but these."""
        stay = _all_but(out, len(self.rows))
        rows, gone = self.rows[stay], self.rows[out]
        if self.is_dual:
            return _Rows(rows, self.targets[stay], self.products[stay][:, stay])
        if len(rows) <= rows.shape[1]:
            return _Rows.of(rows, self.targets[stay])
        return _Rows(rows, self.targets[stay], self.products - gone.T @ gone)

    def centred(self) -> Tensor:
        """The products of rows less their mean."""
        if self.is_dual:
            return _centred_both_ways(self.products)
        mean = self.rows.mean(0)
        return self.products - len(self.rows) * torch.outer(mean, mean)

    def solve(self, strength: float) -> Tensor:
        """[D, N]. With no more rows than features the dual form: the same solution from a system of S unknowns instead of D - 1."""
        mean_rows, mean_targets = self.rows.mean(0), self.targets.mean(0)
        targets, system = self.targets - mean_targets, self.centred()
        diagonal = system.diagonal()
        diagonal += strength * float(diagonal.sum()) / self.rows.shape[1] + 1e-12
        slope = _solve_positive(system, targets if self.is_dual else self.rows.T @ targets)
        if self.is_dual:
            slope = self.rows.T @ (slope - slope.mean(0))
        return torch.cat([slope, (mean_targets - mean_rows @ slope)[None]], 0)


class _Single(NamedTuple):
    """Rows [S, D - 1] and targets [S, N] in float64, and in float32 the products of the shorter side of the rows less their mean."""

    rows: Tensor
    targets: Tensor
    products: Tensor
    work: Tensor
    """As large as the products: every system is factorised here, since new pages cost as much as the arithmetic of a copy."""

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor) -> _Single:
        mean, narrow = rows.mean(0), torch.empty_like(rows, dtype=torch.float32, memory_format=torch.contiguous_format)
        for first in range(0, len(rows), BLOCK):
            narrow[first : first + BLOCK] = rows[first : first + BLOCK] - mean
        products = _symmetric(narrow if len(rows) <= rows.shape[1] else narrow.T)
        return cls(rows, targets, products, torch.empty_like(products))

    @property
    def is_dual(self) -> bool:
        return len(self.rows) <= self.rows.shape[1]

    def without(self, out: Tensor) -> _Single:
        """Of all rows but these."""
        stay = _all_but(out, len(self.rows)).nonzero()[:, 0]
        rows, targets = self.rows[stay], self.targets[stay]
        if self.is_dual:
            products = _centred_both_ways(self.products.index_select(0, stay).index_select(1, stay))
        elif len(rows) <= rows.shape[1]:
            return _Single.of(rows, targets)
        else:
            before, mean = self.rows.mean(0), rows.mean(0)
            products = self.products - _symmetric((self.rows[out] - before).float().T)
            products -= len(rows) * torch.outer(mean - before, mean - before).float()
        return _Single(rows, targets, products, self.work.view(-1)[: products.numel()].view_as(products))

    def solve(self, strength: float) -> Tensor | None:
        """[D, N]; None where the system cannot be factorised, or corrections do not end."""
        mean, mean_targets = self.rows.mean(0), self.targets.mean(0)
        targets = (self.targets - mean_targets).T
        added = strength * self._squared(mean) / self.rows.shape[1] + 1e-12
        factor = self.work.copy_(self.products).T  # the same, and in the order of the factorisation
        factor.diagonal().add_(added)
        failed = torch.zeros((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if bool(failed):
            return None
        system = _System(self.rows, mean, added, factor)
        found = _corrected(system, targets if self.is_dual else system.to_features(targets))
        if found is None:
            return None
        slope = system.to_features(found) if self.is_dual else found
        return torch.cat([slope, (mean_targets - slope @ mean)[:, None]], 1).T

    def _squared(self, mean: Tensor) -> float:
        """The sum of all squares of rows less their mean."""
        return float(torch.linalg.vector_norm(self.rows).square() - len(self.rows) * mean.square().sum())


class _System(NamedTuple):
    """A A' + c I, or A' A + c I if there are fewer features than rows; A: rows less their mean, in float64. factor: in float32.

    Unknowns are rows, [N, n]: a product with few rows reads A once, one with few columns takes four times as long.
    """

    rows: Tensor
    mean: Tensor
    added: float
    factor: Tensor

    def to_features(self, unknowns: Tensor) -> Tensor:
        return unknowns @ self.rows - unknowns.sum(1, keepdim=True) * self.mean

    def to_rows(self, unknowns: Tensor) -> Tensor:
        return unknowns @ self.rows.T - (unknowns @ self.mean)[:, None]

    def times(self, unknowns: Tensor) -> Tensor:
        is_dual = len(self.rows) <= self.rows.shape[1]
        product = self.to_rows(self.to_features(unknowns)) if is_dual else self.to_features(self.to_rows(unknowns))
        return product + self.added * unknowns

    def nearly_solved(self, wanted: Tensor) -> Tensor:
        """By the factor. Rows are scaled for float32, whose range is small."""
        scale = wanted.abs().amax(1, keepdim=True).clamp(min=1e-300)
        found: Tensor = torch.cholesky_solve((wanted / scale).float().T, self.factor).T
        return found.double() * scale


def _corrected(system: _System, wanted: Tensor) -> Tensor | None:
    """The solution for these rows; None where corrections do not shrink to nothing."""
    found, before = system.nearly_solved(wanted), 1.0
    for _ in range(CORRECTIONS):
        step = system.nearly_solved(wanted - system.times(found))
        found = found + step
        size = float((step.norm(dim=1) / found.norm(dim=1).clamp(min=1e-300)).max())
        if not size < before / 2:  # also what is no number
            return None
        if size * size / before <= WRONG_BY:  # the next step would be as much smaller again
            return found
        before = size
    return None


def _symmetric(rows: Tensor) -> Tensor:
    """rows @ rows.T, of which one triangle is computed."""
    found = rows.new_empty(len(rows), len(rows))
    for first in range(0, len(rows), BLOCK):
        last = min(first + BLOCK, len(rows))
        found[first:last, :last] = rows[first:last] @ rows[:last].T
        found[:first, first:last] = found[first:last, :first].T
    return found


def _centred_both_ways(products: Tensor) -> Tensor:
    """Products of rows as those of rows less their mean."""
    mean = products.mean(0)
    return products - mean - mean[:, None] + mean.mean()


def _all_but(out: Tensor, count: int) -> Tensor:
    stay = torch.ones(count, dtype=torch.bool, device=out.device)
    stay[out] = False
    return stay


def _solve_positive(system: Tensor, targets: Tensor) -> Tensor:
    """The solution of a symmetric system that rounding may have made less than positive."""
    factor, failed = torch.linalg.cholesky_ex(system)
    return torch.linalg.solve(system, targets) if bool(failed) else torch.cholesky_solve(targets, factor)

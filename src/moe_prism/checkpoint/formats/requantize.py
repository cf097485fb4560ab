"""Move the rows and columns of a quantized matrix: codes where groups stay whole, new codes and scales where they do not.

Rows move with a code untouched where a group is one row high, columns where a group takes all of them. Otherwise a group that comes
whole from one group keeps its codes and its scale, and any other is quantized again, its scale searched. Where it is known how columns
are used together, what rounding one of them leaves goes to the next ones of its group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .grids import Integers
from .matrix import CodedMatrix, spread

REFITS = 3  # least-squares scale, then codes again; the error has settled by then
TOGETHER = 32  # neighbouring columns that take up each other's errors
IN_CACHE = 1 << 15  # values whose scale is searched at a time: some thirty scales are tried on them
DAMP = 0.3  # of the mean square: chosen on calibration text of nano (layers 1 and 4; .1 to 1 differ by 3 %)


class Counts(NamedTuple):
    """What errors in the columns of a matrix count, by what they are multiplied with: h [i] of many tokens.

    alone [.., i]: of an error in one column. together [.., ceil(i / 32), 32, 32]: means of h_i h_j of neighbours, zero beyond the last
    column; None where columns are not neighbours.
    """

    alone: Tensor
    together: Tensor | None = None


class Moved(NamedTuple):
    """A matrix with rows and columns in another order, and what that cost.

    error, size: sums of squares of the change and of the values that were to be kept; again: the share of groups quantized again.
    """

    matrix: CodedMatrix
    error: float
    size: float
    again: float


def move(matrix: CodedMatrix, rows: Tensor, columns: Tensor, counts: Counts | None = None) -> Moved:
    """New row j is old rows[j], new column j old columns[j]. counts: of the new columns, default all alike."""
    row_groups, whole_rows = _sources(rows, matrix.group[0])
    column_groups, whole_columns = _sources(columns, matrix.group[1])
    zeros = matrix.zeros
    moved = replace(
        matrix,
        codes=matrix.codes[rows][:, columns],
        scales=matrix.scales[row_groups][:, column_groups],
        zeros=None if zeros is None else zeros[row_groups][:, column_groups],
    )
    mixed = ~(whole_rows[:, None] & whole_columns[None])
    if not bool(mixed.any()):
        return Moved(moved, 0.0, 1.0, 0.0)
    wanted = matrix.values()[rows][:, columns]
    fresh = quantize(wanted, matrix, counts)
    inside = spread(mixed, matrix.group, wanted.shape).expand(wanted.shape)
    merged = replace(
        moved,
        codes=torch.where(inside, fresh.codes, moved.codes),
        scales=torch.where(mixed, fresh.scales, moved.scales),
        zeros=None if moved.zeros is None or fresh.zeros is None else torch.where(mixed, fresh.zeros, moved.zeros),
    )
    error = (merged.values() - wanted).double().square().sum()
    return Moved(merged, float(error), float(wanted.double().square().sum()), float(mixed.float().mean()))


def quantize(values: Tensor, like: CodedMatrix, counts: Counts | None = None) -> CodedMatrix:
    """float32 values [o, i] in the form of `like`: per group the scale (and zero) with the least squared error of those tried.

    Codes are the nearest ones, or fed back (see `_fed_back`) where `counts` say how columns act together.
    """
    x, weight = _grouped(values, like.group), None
    if counts is not None:
        weight = _grouped(counts.alone.expand(values.shape), like.group)
    few = max(1, IN_CACHE // max(1, x[0].numel()))
    cuts = [slice(start, start + few) for start in range(0, len(x), few)]
    found = [_searched(x[cut], _part(weight, cut), _part(like.zeros, cut), like) for cut in cuts]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    coded = replace(
        like, codes=_flat(codes, like.group, values.shape), scales=scales, zeros=None if like.zeros is None else zeros
    )
    if counts is None or counts.together is None:
        return coded
    return replace(coded, codes=_fed_back(values, coded, counts.together))


def _part(whole: Tensor | None, rows: slice) -> Tensor | None:
    return None if whole is None else whole[rows]


def _searched(x: Tensor, weight: Tensor | None, fixed: Tensor | None, like: CodedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros (or scales) of groups x [.., .., g]: of the scales tried, those with the least error. fixed: zeros."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    reach = (high - low) / (2 * like.grid.top) if like.zero_range else torch.maximum(high, -low) / like.grid.top
    best: tuple[Tensor, ...] | None = None
    for ratio in like.grid.ratios:
        scales = _storable(reach * ratio, like)
        zeros = _zeros(low * ratio / scales, like) if like.zero_range else fixed
        best = _better(best, _try(x, scales, zeros, like, weight))
    assert best is not None
    for _ in range(REFITS):
        _, scales, zeros = best
        shift = None if fixed is None else zeros
        steps = like.grid.nearest(_on_grid(x, scales, shift)) - (0 if shift is None else shift[..., None])
        weighted = steps if weight is None else steps * weight
        fit = (weighted * x).sum(-1) / (weighted * steps).sum(-1).clamp_min(1e-30)
        best = _better(best, _try(x, _storable(fit.clamp_min(0), like), shift, like, weight))
    _, scales, zeros = best
    return like.grid.encode(_on_grid(x, scales, None if fixed is None else zeros)), scales, zeros


def _fed_back(values: Tensor, coded: CodedMatrix, together: Tensor) -> Tensor:
    """Codes column by column, in the scales there are: what rounding leaves of one, those behind it in its group and block take up.

    GPTQ (arXiv 2210.17323) with its Hessian cut into blocks of TOGETHER, which are small enough to be kept for every expert.
    """
    rows, columns = values.shape
    spare = -columns % TOGETHER
    group = torch.arange(columns + spare).div(coded.group[1], rounding_mode="floor").reshape(-1, TOGETHER)
    squares = together.double() * (group[:, :, None] == group[:, None, :])
    level = squares.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    squares.diagonal(dim1=1, dim2=2).add_(DAMP * level[:, None])
    share = torch.linalg.cholesky(torch.linalg.inv(squares), upper=True).float()

    def blocks(numbers: Tensor, beyond: float) -> Tensor:
        return torch.nn.functional.pad(numbers.expand(values.shape), (0, spare), value=beyond).reshape(rows, -1, TOGETHER)

    left = blocks(values, 0.0).clone()
    scales = blocks(spread(coded.scales, coded.group, values.shape), 1.0)
    zeros = None if coded.zeros is None else blocks(spread(coded.zeros, coded.group, values.shape), 0.0)
    codes = []
    for i in range(TOGETHER):
        shift = 0.0 if zeros is None else zeros[..., i]
        codes.append(coded.grid.encode(left[..., i] / scales[..., i] + shift))
        rest = left[..., i] - (coded.grid.decode(codes[-1]) - shift) * scales[..., i]
        left[..., i + 1 :] -= (rest / share[:, i, i])[..., None] * share[:, i, i + 1 :]
    return torch.stack(codes, -1).reshape(rows, -1)[:, :columns].contiguous()


def _on_grid(x: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Where values lie among the codes."""
    steps = x / scales[..., None]
    return steps if zeros is None else steps.add_(zeros[..., None])


def _try(x: Tensor, scales: Tensor, zeros: Tensor | None, like: CodedMatrix, weight: Tensor | None) -> tuple[Tensor, ...]:
    """(error per group, scales, zeros or scales)."""
    error = like.grid.nearest(_on_grid(x, scales, zeros))
    if zeros is not None:
        error.sub_(zeros[..., None])
    error.mul_(scales[..., None]).sub_(x).square_()
    if weight is not None:
        error *= weight
    return error.sum(-1), scales, scales if zeros is None else zeros


def _better(old: tuple[Tensor, ...] | None, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if old is None:
        return new
    better = new[0] < old[0]
    return tuple(torch.where(better, b, a) for a, b in zip(old, new, strict=True))


def _zeros(lowest: Tensor, like: CodedMatrix) -> Tensor:
    """Zeros that put a group's lowest value, in steps of its scale, on the lowest code."""
    assert isinstance(like.grid, Integers) and like.zero_range
    return (like.grid.low - lowest).round().clamp(*like.zero_range)


def _storable(scales: Tensor, like: CodedMatrix) -> Tensor:
    """Scales the format can store; a group of zeros, or one too small for the format, gets a scale all the same."""
    stored = like.round_scale(scales)
    return torch.where(stored > 0, stored, like.round_scale(torch.ones_like(stored)))


def _sources(order: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Of each new group: the old group of its first member, and whether all members come from it."""
    old = order // group
    first = old[::group]
    whole = old == first.repeat_interleave(group)[: len(old)]
    padded = torch.nn.functional.pad(whole, (0, -len(whole) % group), value=True)
    return first, padded.reshape(-1, group).all(1)


def _grouped(values: Tensor, group: tuple[int, int]) -> Tensor:
    """[o, i] -> [groups, groups, go * gi], filled up with zeros."""
    rows, columns = values.shape
    values = torch.nn.functional.pad(values, (0, -columns % group[1], 0, -rows % group[0]))
    return values.reshape(-1, group[0], values.shape[1] // group[1], group[1]).transpose(1, 2).flatten(2)


def _flat(codes: Tensor, group: tuple[int, int], shape: torch.Size) -> Tensor:
    rows = codes.reshape(*codes.shape[:2], *group).transpose(1, 2)
    return rows.reshape(codes.shape[0] * group[0], -1)[: shape[0], : shape[1]].contiguous()

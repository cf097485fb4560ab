"""Which experts stay: scores of all layers -> kept ids per layer, under a budget, protection and group-limited routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ...errors import UsageError
from ...model.router import RoutingGroups
from ...options.prune import Allocation, GroupMode
from .constants import Constants


@dataclass(frozen=True)
class PruneRequest:
    """keep: share of the experts in (0, 1]; allocation: the same number in every layer, one ranking over all layers (`global`), or by what
    the model loses with each layer alone pruned (`measured`).

    groups: what happens to a group-limited router: `per_group` keeps equally many in every group, `regroup` deals the kept ones into equal
    groups in the order of their ids, `mask` leaves groups unequal (no memory is saved), `drop_groups` removes whole groups.
    """

    keep: float
    allocation: Allocation = "layer"
    groups: GroupMode = "per_group"
    is_absolute: bool = False  # of the criterion whose scores are ranked

    def check(self) -> None:
        """Raises UsageError for what can never work."""
        if not 0 < self.keep <= 1:
            raise UsageError(f"--keep {self.keep:g} is outside (0, 1]", "0.5 keeps half of the experts, 1 all of them")
        for value, legal in ((self.allocation, get_args(Allocation)), (self.groups, get_args(GroupMode))):
            if value not in legal:
                raise UsageError(f"unknown choice '{value}'", f"choose one of: {', '.join(legal)}")


@dataclass(frozen=True)
class KeptExperts:
    """What stays of one layer. kept: ids in the order they get after removal; groups: the router's after it; masked: not removable.

    constants: the vectors that take the place of the others, in the order of their ids; None: nothing does.
    """

    experts: int
    kept: tuple[int, ...]
    groups: RoutingGroups | None = None
    masked: bool = False
    constants: Constants | None = None

    @property
    def gone(self) -> tuple[int, ...]:
        """Ids of the others."""
        stay = set(self.kept)
        return tuple(e for e in range(self.experts) if e not in stay)

    def mask(self) -> Tensor:
        """[E] (bool): what stays in memory; of a masked layer all."""
        return torch.tensor([self.masked or e in set(self.kept) for e in range(self.experts)])

    @property
    def is_full(self) -> bool:
        return len(self.kept) == self.experts


def choose(
    scores: Sequence[Tensor],
    request: PruneRequest,
    per_token: int,
    protected: Sequence[Tensor],
    groups: Sequence[RoutingGroups | None],
    counts: Sequence[int] | None = None,
) -> list[KeptExperts]:
    """scores [E] and protected [E] (bool) per layer; counts: how many stay in each, by default by the request's `layer` or `global`.

    UsageError where the request cannot be met: fewer experts than k, than are protected, or than groups need.
    """
    request.check()
    counts = keep_counts(scores, request, per_token, protected, groups) if counts is None else counts
    return [
        _choose_layer(s, n, per_token, p, g, request.groups) for s, n, p, g in zip(scores, counts, protected, groups, strict=True)
    ]


def keep_counts(
    scores: Sequence[Tensor],
    request: PruneRequest,
    per_token: int,
    protected: Sequence[Tensor],
    groups: Sequence[RoutingGroups | None],
) -> list[int]:
    """Experts that stay, per layer, by the allocation `layer` or `global`; of `measured` the equal numbers it redistributes."""
    wanted = [round(request.keep * len(s)) for s in scores]
    for layer, (n, s, p) in enumerate(zip(wanted, scores, protected, strict=True)):
        if n < per_token:
            raise UsageError(
                f"--keep {request.keep:g} leaves {n} of {len(s)} experts in layer {layer}, a token uses {per_token}",
                f"give at least {per_token / len(s):.3g}",
            )
        if n < int(p.sum()):
            raise UsageError(f"{int(p.sum())} experts of layer {layer} are protected, {n} would stay", "raise --keep")
    if request.allocation != "layer" and any(groups):
        raise UsageError(
            f"--allocation {request.allocation} would leave layers with unequal groups", "use --allocation layer for this model"
        )
    if request.allocation != "global":
        return wanted
    shares = scores if request.is_absolute else [s.double() / s.double().abs().sum().clamp(min=1e-300) for s in scores]
    return _pooled(shares, sum(wanted), per_token, protected)


def _pooled(scores: Sequence[Tensor], total: int, per_token: int, protected: Sequence[Tensor]) -> list[int]:
    """One ranking over all layers; every layer keeps its k best and what is protected."""
    ranked = []
    for layer, (s, p) in enumerate(zip(scores, protected, strict=True)):
        order = _ranked(s, p)
        floor = max(per_token, int(p.sum()))
        ranked += [(place >= floor, -float(s[e]), layer, place) for place, e in enumerate(order)]
    counts = [0] * len(scores)
    for _, _, layer, _ in sorted(ranked)[:total]:
        counts[layer] += 1
    return counts


def _ranked(scores: Tensor, protected: Tensor) -> list[int]:
    """Ids, best first: what is protected, then by score, ties to the lower id."""
    values, shield = scores.double().tolist(), protected.tolist()
    return sorted(range(len(values)), key=lambda e: (not shield[e], -values[e], e))


def _choose_layer(
    scores: Tensor, n: int, k: int, protected: Tensor, groups: RoutingGroups | None, mode: GroupMode
) -> KeptExperts:
    experts = len(scores)
    if n == experts:
        return KeptExperts(experts, tuple(range(experts)), groups)
    if groups is None:
        return KeptExperts(experts, tuple(sorted(_ranked(scores, protected)[:n])))
    return _IN_GROUPS[mode](scores, n, k, protected, groups)


def _per_group(scores: Tensor, n: int, k: int, protected: Tensor, groups: RoutingGroups) -> KeptExperts:
    each = _equal(n, groups, k, "per_group")
    size, kept = len(scores) // groups.count, []
    for g in range(groups.count):
        part = slice(g * size, (g + 1) * size)
        if int(protected[part].sum()) > each:
            raise UsageError(f"group {g} has {int(protected[part].sum())} protected experts, {each} would stay", "raise --keep")
        kept += [g * size + e for e in sorted(_ranked(scores[part], protected[part])[:each])]
    return KeptExperts(len(scores), tuple(kept), groups)


def _regroup(scores: Tensor, n: int, k: int, protected: Tensor, groups: RoutingGroups) -> KeptExperts:
    _equal(n, groups, k, "regroup")
    return KeptExperts(len(scores), tuple(sorted(_ranked(scores, protected)[:n])), groups)


def _equal(n: int, groups: RoutingGroups, k: int, mode: str) -> int:
    """Experts per group. UsageError where groups of that size cannot route."""
    each = n // groups.count
    if n % groups.count:
        raise UsageError(
            f"{n} experts do not fill {groups.count} equal groups", f"choose --keep for a multiple of {groups.count}"
        )
    if each < groups.least:
        raise UsageError(f"--groups {mode} leaves {each} experts per group, its score needs {groups.least}", "raise --keep")
    if groups.limit * each < k:
        raise UsageError(
            f"a token may use {groups.limit} groups of {each} experts, and needs {k}", "raise --keep, or use --groups drop_groups"
        )
    return each


def _mask(scores: Tensor, n: int, k: int, protected: Tensor, groups: RoutingGroups) -> KeptExperts:
    size = len(scores) // groups.count
    kept = sorted(_ranked(scores, protected)[:n])
    left = torch.bincount(torch.tensor(kept) // size, minlength=groups.count)
    able = sorted(int(c) for c in left if c >= groups.least)
    if len(able) < groups.limit or sum(able[: groups.limit]) < k:
        raise UsageError(
            f"--groups mask leaves groups of {left.tolist()} experts; a token's best {groups.limit} may hold fewer than {k}",
            "raise --keep, or use --groups per_group",
        )
    return KeptExperts(len(scores), tuple(kept), groups, masked=True)


def _drop_groups(scores: Tensor, n: int, k: int, protected: Tensor, groups: RoutingGroups) -> KeptExperts:
    size = len(scores) // groups.count
    if n % size:
        raise UsageError(f"{n} experts are no whole groups of {size}", f"choose --keep for a multiple of {size}")
    left = n // size
    if left < groups.limit:
        raise UsageError(f"{left} groups would stay, a token may use {groups.limit}", "raise --keep, or use --groups per_group")
    total = scores.double().reshape(groups.count, size).sum(1)
    order = _ranked(total, protected.reshape(groups.count, size).any(1))
    if int(protected.reshape(groups.count, size).any(1).sum()) > left:
        raise UsageError(f"more than {left} groups hold protected experts", "raise --keep, or use --groups per_group")
    kept = [g * size + e for g in sorted(order[:left]) for e in range(size)]
    return KeptExperts(len(scores), tuple(kept), RoutingGroups(left, groups.limit, groups.least))


_IN_GROUPS = {"per_group": _per_group, "regroup": _regroup, "mask": _mask, "drop_groups": _drop_groups}

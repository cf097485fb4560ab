"""Which neurons stay: scores of all layers -> masks, under a budget, protection and widths. Shapes: L layers, E experts, f neurons each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from ...options.compress import NeuronScope

NEVER = torch.inf


@dataclass(frozen=True)
class SliceRequest:
    """keep: share of the neurons in (0, 1]. scope: among which neurons the ranking is: of the whole `model`, of a `layer`, or of an
    `expert`, so that all are equally wide. multiple: widths are multiples of it. shares: of every layer, instead of `keep`, for `layer`.
    """

    keep: float
    scope: NeuronScope = "model"
    multiple: int = 1
    shares: tuple[float, ...] | None = None

    def check(self, width: int) -> None:
        """UsageError for what no layer of this width can meet."""
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep {self.keep:g} is outside (0, 1]", "0.75 keeps three quarters of the neurons")
        if not 1 <= self.multiple <= width:
            raise UsageError(f"widths of experts cannot be multiples of {self.multiple}", f"give 1 to {width}, their own width")


def choose_neurons(scores: Sequence[Tensor], request: SliceRequest, protected: Sequence[Tensor]) -> list[Tensor]:
    """[E, f] (bool) of every layer: the neurons that stay. scores [E, f]: what is lost without each; protected [E, f] (bool): what stays
    whatever it scores. Ties go to lower layers, experts and neurons. With the scope `expert` one width for all layers.

    An expert's neurons are ranked, best first, and cut into pieces of `multiple`; pieces stay by their mean score. So widths are multiples,
    and with a multiple of 1 this is the plain ranking. UsageError where more is protected than would stay.
    """
    for own in scores:
        request.check(own.shape[1])
    masks: list[Tensor]
    if request.scope == "model":
        masks = _ranked(scores, request.keep, request.multiple, protected)
    elif request.scope == "layer":
        shares = request.shares or (request.keep,) * len(scores)
        each = zip(scores, shares, protected, strict=True)
        masks = [_ranked([own], share, request.multiple, [shield])[0] for own, share, shield in each]
    else:
        masks = [_equal(own, request, shield) for own, shield in zip(scores, protected, strict=True)]
    lost = sum(int((shield & ~mask).sum()) for mask, shield in zip(masks, protected, strict=True))
    if lost:
        raise UsageError(
            f"{lost} of the protected neurons would not stay", "keep more, protect less, or let experts differ in width"
        )
    return masks


def equal_width(width: int, keep: float, multiple: int) -> int:
    """The width nearest to a share, of those that are multiples; at least one multiple."""
    return min(width, max(1, round(keep * width / multiple)) * multiple)


def _equal(scores: Tensor, request: SliceRequest, protected: Tensor) -> Tensor:
    stay = equal_width(scores.shape[1], request.keep, request.multiple)
    order = _order(scores.double().masked_fill(protected, NEVER))
    return torch.zeros_like(protected).scatter(1, order[:, :stay], True)


def _ranked(scores: Sequence[Tensor], keep: float, multiple: int, protected: Sequence[Tensor]) -> list[Tensor]:
    """One ranking of all layers that are given."""
    orders, pieces = [], []
    for own, shield in zip(scores, protected, strict=True):
        values = own.double().masked_fill(shield, NEVER)
        order = _order(values)
        orders.append(order)
        pieces.append(_pieces(values.gather(1, order), multiple))
    flat = torch.cat([mean.flatten() for mean in pieces])
    sizes = torch.cat([_sizes(own, multiple).flatten() for own in scores])
    first = flat.argsort(descending=True, stable=True)
    wanted = keep * sum(own.numel() for own in scores)
    reached = sizes[first].cumsum(0)
    stay = torch.zeros_like(flat, dtype=torch.bool)
    # the number of pieces whose neurons come nearest to what is asked for
    stay[first[: 1 + int((reached.double() - wanted).abs().argmin())]] = True
    masks = []
    for own, order, kept in zip(scores, orders, torch.split(stay, [mean.numel() for mean in pieces]), strict=True):
        of_rank = kept.view(len(own), -1).repeat_interleave(multiple, 1)[:, : own.shape[1]]
        masks.append(torch.zeros_like(of_rank).scatter(1, order, of_rank))
    return masks


def _order(values: Tensor) -> Tensor:
    """[E, f]: neurons of every expert, best first."""
    return values.argsort(dim=1, descending=True, stable=True)


def _pieces(ranked: Tensor, multiple: int) -> Tensor:
    """[E, P]: mean scores of an expert's pieces, which fall from the first to the last."""
    return torch.stack([piece.mean(1) for piece in torch.split(ranked, multiple, 1)], 1)


def _sizes(scores: Tensor, multiple: int) -> Tensor:
    """[E, P]: neurons of every piece."""
    row = torch.tensor([len(piece) for piece in torch.split(torch.arange(scores.shape[1]), multiple)])
    return row.expand(len(scores), -1)

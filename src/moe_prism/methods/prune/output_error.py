"""Greedy removal by what the layer's output loses, with the tokens of a removed expert routed to what is left."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...calibrate.scores import KINDS, kind_of, raw
from ...compress.prune.base import Criterion, LayerSubject
from ...errors import UsageError

AGREE = 0.98  # share of sampled choices that scores alone must explain


class OutputError(Criterion):
    """From all experts on, the one whose removal costs least goes; an expert's score is what its removal adds to the cost, never falling.

    Cost: mean over sampled tokens of r / (1 + r), r = ‖y - y'‖² / ‖h + y‖², y' the layer's routed output after removal with the family's
    weights among the kept. It saturates because a norm follows: a token that is lost cannot be lost twice. Other criteria ask what an
    expert gives; this one asks what is missing once another has taken its tokens.
    """

    needs = ("grams",)
    is_absolute = True

    def scores(self, subject: LayerSubject) -> Tensor:
        sample = _Sample(subject)
        live = torch.ones(subject.experts, dtype=torch.bool)
        price = torch.zeros(subject.experts, dtype=torch.float64)
        last = before = 0.0
        for _ in range(subject.experts - subject.per_token):
            open_to = (live & ~subject.protected).nonzero().flatten().tolist()
            if not open_to:
                break
            now, gone = min((sample.cost(live, e), e) for e in open_to)
            live[gone] = False
            price[gone] = last = max(now - before, math.nextafter(last, math.inf))
            before = now
        rest = live.nonzero().flatten()  # the last k, and what is protected
        price[rest] = last + torch.tensor([1 + sample.alone(int(e)) for e in rest], dtype=torch.float64)
        return price


class _Sample:
    """The sampled tokens of a layer, and its router written as a formula of its scores."""

    def __init__(self, subject: LayerSubject) -> None:
        found = subject.of("grams")
        if not len(found["key"]):
            raise UsageError(f"the router scores of '{subject.name}' were not seen", "use --criterion easy-ep or gate-norm")
        self.gram, self.scores, self.k = found["gram"], found["scores"], subject.per_token
        index, weight = found["index"], found["weight"]
        chosen = self.scores.topk(self.k).indices
        same = (chosen[:, :, None] == index[:, None, :]).any(2).float().mean()
        if float(same) < AGREE:
            raise UsageError(
                f"the router of '{subject.name}' chooses by more than its scores (a bias, groups)", "use --criterion easy-ep"
            )
        self.kind = KINDS[kind_of(self.scores, index, weight)]
        plain = raw(self.scores, self.kind).gather(1, index)
        ratios = [weight.sum(1) / plain.sum(1).clamp(min=1e-30), weight.sum(1)]
        spread = [float(r.std() / r.mean().abs().clamp(min=1e-30)) if len(r) > 1 else 0.0 for r in ratios]
        self.normalised = spread[1] < spread[0]
        self.scale = float(ratios[int(self.normalised)].mean())
        self.full = self.weights(torch.ones(subject.experts, dtype=torch.bool))

    def cost(self, live: Tensor, gone: int) -> float:
        """With `live` [E] (bool) but one."""
        left = live.clone()
        left[gone] = False
        (full, before), (now, after) = self.full, self.weights(left)
        experts, change = (
            torch.cat([full, now], 1),
            torch.cat([before, -after], 1),
        )  # [S, 2k]: the quadratic form is zero elsewhere
        token = torch.arange(len(experts))[:, None, None]
        form = self.gram[token, experts[:, :, None], experts[:, None, :]]
        r = torch.einsum("ta,tab,tb->t", change, form, change).clamp(min=0)
        return float((r / (1 + r)).mean())

    def alone(self, expert: int) -> float:
        """The mean relative energy one expert gives among all of them."""
        index, weight = self.full
        mine = (weight * (index == expert)).sum(1)
        return float((mine.square() * self.gram[:, expert, expert]).mean())

    def weights(self, live: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and routing weights [S, k] among the live experts."""
        scores = self.scores.masked_fill(~live, -torch.inf)
        index = scores.topk(min(self.k, int(live.sum()))).indices
        weight = raw(scores, self.kind).gather(1, index)
        if self.normalised:
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-30)
        return index, self.scale * weight

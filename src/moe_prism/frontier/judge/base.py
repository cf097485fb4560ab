"""The contract of a slice: questions made once of held-out text, and verdicts on them at any operating point."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...cache_names import cache_argument, made_cache
from ...elastic import Elastic
from ..measure import logits_of
from ..record import SliceScore
from .words import Word, words

LEAST = 8  # questions that the full model gets right; with fewer a slice says nothing
SEED = 0
ASKED = 2_048  # tokens that run together


@dataclass(frozen=True)
class Material:
    """What questions are made of: a model at full budget, and windows of held-out text, ids [n, length]."""

    model: Any
    tokenizer: Any
    ids: Tensor

    @cached_property
    def words(self) -> list[list[Word]]:
        """Of every window."""
        return [words(self.tokenizer, row) for row in self.ids.tolist()]

    @property
    def elastic(self) -> Elastic:
        return self.model._moe_prism  # type: ignore[no-any-return]


class NoQuestionsError(Exception):
    """A text has no questions of a slice; says why."""


class Slice(ABC):
    """Questions about one ability. A verdict is a number in 0..1: 1 is right, or the same as the full model.

    groups: what each question was taken from. Questions of one group stand or fall together, and standard errors know it.
    """

    name: ClassVar[str]
    is_ability: ClassVar[bool] = True
    """Whether a verdict says that something was right. Else it says that something is as in the full model, which need not be worse."""

    @abstractmethod
    def __init__(self, material: Material) -> None:
        """Make the questions, with the model at full budget. NoQuestionsError for text that has none."""

    groups: Tensor

    @abstractmethod
    def verdicts(self, model: Any) -> Tensor:
        """[Q] at the model's current operating point."""


@dataclass(frozen=True)
class Spans:
    """Tokens that are asked of a model that reads what really stands before them.

    rows: ids [n, L]; spans [Q, 3]: (row, first, stop), the answer is rows[row, first:stop], all of it most likely each.
    """

    rows: Tensor
    spans: Tensor

    def verdicts(self, model: Any) -> Tensor:
        """[Q]: 1.0 where every token of the answer is the most likely one."""
        hits = torch.cat([_hits(model, rows) for rows in batches(self.rows)])
        before = torch.nn.functional.pad(hits.long().cumsum(1), (1, 0))
        row, first, stop = self.spans.unbind(1)
        return (before[row, stop] - before[row, first] == stop - first).double()


def _hits(model: Any, rows: Tensor) -> Tensor:
    """[b, L]: where a token is the most likely one after those before it; nothing is asked of the first."""
    best = logits_of(model, rows.to(model.device)).argmax(-1).view(len(rows), -1).cpu()
    return torch.nn.functional.pad(best == rows[:, 1:], (1, 0))


def batches(rows: Tensor, more: int = 0) -> list[Tensor]:
    """Rows [n, L] that run together, where each grows by so many tokens."""
    size = max(1, ASKED // (rows.shape[1] + more))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def greedy(model: Any, rows: Tensor, count: int) -> Tensor:
    """[n, count]: the most likely tokens after rows [n, L], one after the other; an end token does not stop it."""
    made: list[Tensor] = []
    given, past = rows.to(model.device), dict[str, Any]()
    for _ in range(count):
        out = model(input_ids=given, use_cache=True, **past)
        given, past = out.logits[:, -1:].float().argmax(-1), cache_argument(model, made_cache(out))
        made.append(given.cpu())
    return torch.cat(made, 1)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def score(made: Slice, full: Tensor, found: Tensor) -> SliceScore:
    """What verdicts [Q] say beside those of the full model. kept is over the questions that the full model gets right."""
    groups = made.groups
    right = full > 0
    kept = found[right]
    flips = ((found > 0) != right) if bool(((found == 0) | (found == 1)).all()) else found < full
    return SliceScore(
        kept=float(kept.mean()),
        stderr=clustered_error(kept, groups[right]),
        right=float(found.mean()),
        full=float(full.mean()),
        flips=float(flips.double().mean()),
        items=len(full),
        is_ability=made.is_ability,
    )


def clustered_error(values: Tensor, groups: Tensor) -> float:
    """Standard error of the mean of values [n] whose groups [n] were drawn, not they themselves; of one group alone as if they were."""
    n, off = len(values), values - values.mean()
    names, place = torch.unique(groups, return_inverse=True)
    if len(names) < 2:
        place, names = torch.arange(n), torch.arange(n)
    if len(names) < 2:
        return 0.0
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, place, off.double())
    return math.sqrt(float((sums**2).sum()) * len(names) / (len(names) - 1)) / n

"""Structured choices by expert id: single draws that show how far chance can fall (arXiv 2505.03531, Table 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...compress.prune.base import Criterion, LayerSubject


def _ids(subject: LayerSubject) -> Tensor:
    return torch.arange(subject.experts, dtype=torch.float64)


class Odd(Criterion):
    """1, 3, 5, ... first, counted from 0; the lower id first among them. Keeping less or more than half is well defined too."""

    paper = "arXiv 2505.03531"
    is_blind = True

    def scores(self, subject: LayerSubject) -> Tensor:
        return (_ids(subject) % 2) * subject.experts - _ids(subject)


class Even(Criterion):
    """0, 2, 4, ... first."""

    paper = "arXiv 2505.03531"
    is_blind = True

    def scores(self, subject: LayerSubject) -> Tensor:
        return (1 - _ids(subject) % 2) * subject.experts - _ids(subject)


class FirstHalf(Criterion):
    """The lowest ids."""

    paper = "arXiv 2505.03531"
    is_blind = True

    def scores(self, subject: LayerSubject) -> Tensor:
        return -_ids(subject)


class LastHalf(Criterion):
    """The highest ids."""

    paper = "arXiv 2505.03531"
    is_blind = True

    def scores(self, subject: LayerSubject) -> Tensor:
        return _ids(subject)

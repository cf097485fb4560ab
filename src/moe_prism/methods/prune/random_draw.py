"""A uniform draw: the baseline every criterion has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ...compress.prune.base import Criterion, LayerSubject


class RandomDraw(Criterion):
    """Every layer draws for itself; the draws of all kept fractions are nested."""

    paper = "arXiv 2505.03531"
    is_blind = True

    def scores(self, subject: LayerSubject) -> Tensor:
        generator = torch.Generator().manual_seed(subject.seed * 100_003 + subject.layer)
        return torch.randperm(subject.experts, generator=generator).double()

"""Counts of the router's choices (SEER-MoE, arXiv 2404.05089, as arXiv 2505.03531 uses them; formulas are ours, the paper has none)."""

from __future__ import annotations

from torch import Tensor

from ...compress.prune.base import Criterion, LayerSubject
from ...errors import UsageError


class HardCount(Criterion):
    """A_i = number of tokens that chose expert i."""

    paper = "arXiv 2404.05089"
    needs = ("counts",)

    def scores(self, subject: LayerSubject) -> Tensor:
        return subject.of("counts")["count"].double()


class SoftCount(Criterion):
    """S_i = router probability of expert i summed over all tokens, chosen or not (see `calibrate.scores`)."""

    paper = "arXiv 2404.05089"
    needs = ("scores",)

    def scores(self, subject: LayerSubject) -> Tensor:
        found = subject.of("scores")
        if not int(found["tokens"]):
            raise UsageError(f"the router scores of '{subject.name}' were not seen", "use --criterion soft-selected or gate-norm")
        return found["prob_sum"].double()


class SoftSelected(Criterion):
    """The same over the tokens that chose expert i only: the sum of its routing weights."""

    paper = "arXiv 2404.05089"
    needs = ("counts",)

    def scores(self, subject: LayerSubject) -> Tensor:
        return subject.of("counts")["weight_sum"].double()

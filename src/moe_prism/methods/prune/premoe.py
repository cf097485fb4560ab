"""PreMoE: experts stay by how sure the router is of them (arXiv 2505.17639), from its description."""

from __future__ import annotations

from torch import Tensor

from ...calibrate.confidence import threshold, utility
from ...compress.prune.base import Criterion, LayerSubject
from ...errors import UsageError


class PreMoe(Criterion):
    """The mean over all tokens of max(z, sigmoid z) of an expert, z the router's score. It counts where the expert's probability among the
    token's k best is at least the layer's mean of the largest. Only the router is read.
    """

    paper = "arXiv 2505.17639"
    needs = ("confidence",)

    def scores(self, subject: LayerSubject) -> Tensor:
        found = subject.of("confidence")
        if not int(found["tokens"]):
            raise UsageError(f"the router scores of '{subject.name}' were not seen", "use --criterion soft-selected or easy-ep")
        return utility(found, threshold(found))

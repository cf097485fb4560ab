"""The paper's proxy (arXiv 2510.19366, section on gating): a block's score is the mean |activation| of its gate neurons."""

from __future__ import annotations

from torch import Tensor

from ...errors import UsageError
from ..base import LayerParts, Scorer, gate_activations, gate_activations_all, per_expert


class GateScores(Scorer):
    """s[e, n](x) = (1/r) sum over gate neurons of |SiLU(W_gate x) * (W_up x)|; no weights of its own."""

    def __init__(self, parts: LayerParts) -> None:
        if not parts.gates:
            raise UsageError(
                "the scorer 'gates' reads gate neurons, and this model has none",
                "refactor with --gates 4, or take another scorer",
            )
        super().__init__(parts)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return gate_activations_all(self.parts, x, index).mean(-1)

        def score(expert: int, tokens: Tensor) -> Tensor:
            return gate_activations(self.parts, x[tokens], expert).mean(-1)

        return per_expert(index, self.parts.layer.num_experts, score, self.parts.n_sub)

    def parameters_per_expert(self) -> int:
        return 0

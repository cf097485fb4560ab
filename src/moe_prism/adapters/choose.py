"""Which experts a fine-tune should change: ESFT (arXiv 2407.01906), the fewest that hold a share of a domain's routing.

The public script of ESFT divides scores by their sum over layers. Here each layer's scores are divided by the sum over its experts, as the
paper has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError

By = Literal["gates", "tokens"]


def choose_experts(counts: Sequence[Mapping[str, Tensor]], share: float, by: By = "gates") -> list[list[int]]:
    """Per layer the fewest experts, largest first, whose relevance reaches `share` in (0, 1]; rising ids. Equal ones in the order of ids.

    counts: per MoE layer the statistics of the collector `counts` on text of the domain. by: gates takes the mean routing weight that
    tokens give an expert, tokens the share of the choices that are it. UsageError for another share, or a layer without any token.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of {share:g} is outside (0, 1]", "0.1 to 0.2 is usual")
    found: list[list[int]] = []
    for layer, own in enumerate(counts):
        score = own["weight_sum" if by == "gates" else "count"].double().clamp(min=0)
        total = float(score.sum())
        if not total > 0:
            raise UsageError(f"no token of the text came by layer {layer}", "give more text")
        order = torch.argsort(score, descending=True, stable=True)
        before = score[order].cumsum(0) - score[order]  # what the larger ones hold
        found.append(sorted(order[before < share * total * (1 - 1e-12)].tolist()))
    return found

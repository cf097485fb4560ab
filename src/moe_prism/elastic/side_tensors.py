"""The side tensors of an artefact: every name that stands in `prism.safetensors`, after `layers.<i>.`, in one table.

A side tensor belongs to one layer. Where one of its dimensions runs over the experts, pruning cuts it there with the experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import UsageError

RIDGE = "ridge"
CUTOFFS = "cutoffs"
SHARES = "shares"
LAYER_BUDGETS = "layer_budgets"
REPAIR = "repair"
LOW_RANK_MAP, LOW_RANK_HEADS = "low_rank.map", "low_rank.heads"
COMPENSATE = "compensate."
"""What compensation reads: `compensate.<method>.<name>`."""

EXPERT_DIMENSIONS: Mapping[str, int | None] = {
    RIDGE: 0,  # [E, N, d + N r + 1], the default scorer
    CUTOFFS: None,  # [129], of the threshold rule
    SHARES: None,  # [129], of the layer's slots, those that reached each cutoff on the calibration text
    LAYER_BUDGETS: None,  # [k N], of the rule of that name
    REPAIR: 1,  # [bands, E, d, f] (bfloat16), D_b of every band, of `recover --method repair`
    LOW_RANK_MAP: None,  # [R, d + 1], of the low-rank scorer
    LOW_RANK_HEADS: 0,  # [E, N, 2 R + N r + 1]
}
"""name -> the dimension that runs over experts; None: the experts of a layer share it."""
FORMER = {"levels": CUTOFFS, "plan": LAYER_BUDGETS}
"""Names that version 0.1 wrote."""


def of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's side tensors by today's names."""
    return {FORMER.get(name, name): tensor for name, tensor in tensors.items()}


def expert_dimension(name: str) -> int | None:
    """The dimension of a side tensor that runs over experts; None where they share it. UsageError for a name that is not known."""
    if name.startswith(COMPENSATE):
        return 0
    if name not in EXPERT_DIMENSIONS:
        raise UsageError(f"the side tensor '{name}' is not known", "use the moe-prism version that wrote it")
    return EXPERT_DIMENSIONS[name]

"""Where an expert's weights are for each adapter: the table Pi of ExpertWeave (arXiv 2508.17624), one per MoE layer.

Shapes: M experts of the base model, A adapters, T tokens, k experts per token, L MoE layers. Slots from M on hold tuned experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = -1
"""The adapter of tokens that have none."""


class AdapterTable:
    """Pi [A + 1, M]: row 0 is the base model's own ids, row a + 1 those of adapter a. Slots are given out lowest first."""

    def __init__(self, experts: int, room: int, most: int) -> None:
        """room: slots beyond the base's; most: adapters."""
        self.experts, self.room = experts, room
        self.pi = torch.arange(experts).repeat(most + 1, 1)
        self._free = list(range(experts, experts + room))
        self._held: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def add(self, adapter: int, tuned: Sequence[int]) -> list[int]:
        """The slots that the tuned experts of an adapter get; there must be as many free ones. The adapter must not be there yet."""
        slots, self._free = self._free[: len(tuned)], self._free[len(tuned) :]
        self._held[adapter] = slots
        self.pi[adapter + 1, list(tuned)] = torch.tensor(slots, dtype=torch.int64)
        return slots

    def remove(self, adapter: int) -> list[int]:
        """The slots that are free again, none where it holds none. The rows of all other adapters stay."""
        slots = self._held.pop(adapter, [])
        self._free = sorted([*self._free, *slots])
        self.pi[adapter + 1] = torch.arange(self.experts)
        return slots

    def slots(self, index: Tensor, adapter: int | Tensor) -> Tensor:
        """[T, k]: ids' = Pi[adapter(t), ids]; -1 for ids that name none of the base's experts.

        adapter: of all tokens, or of each [T]; BASE: none.
        """
        known = index.clamp(0, self.experts - 1)
        if self.pi.device != index.device:
            self.pi = self.pi.to(index.device)
        rows = self.pi[adapter + 1]
        found = rows[known] if rows.dim() == 1 else rows.gather(1, known)
        return torch.where(known == index, found, -1)


def fragmentation(experts: int, tuned: Sequence[Sequence[int]]) -> float:
    """How many times the slots in use padding would take: L (M + A E_max) / sum over layers of M + tuned experts.

    tuned [A][L]: experts that each adapter changes in each layer; E_max is the largest of them. Slots that are given out one by one, as
    here, have 1.
    """
    layers, most = len(tuned[0]), max((count for own in tuned for count in own), default=0)
    return layers * (experts + len(tuned) * most) / (layers * experts + sum(map(sum, tuned)))

"""Workers that hold some of the experts each (expert parallelism), or some of the layers (pipeline parallelism).

Selection is the same everywhere. Every worker sees a token's input and the router's choice, has the predictors of all experts and layers,
which are small, and so chooses the same slots. It computes those of the experts that it has; the outputs of all workers are added up. What
comes beside kept slots is added by one of them.

vLLM's CPU build runs neither, so the engine refuses both when it starts (`wiring.unsupported`). Tests run workers as threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...elastic.execute.base import Executor, Settled


@dataclass(frozen=True)
class Placed:
    """Which experts of a layer this worker has. local [E]: the row of each in its weights, -1 where another worker has it: vLLM's
    `expert_map`. gather: [...] -> what every worker gave, by rank.
    """

    local: Tensor
    rank: int
    gather: Callable[[Tensor], list[Tensor]]

    def every(self, own: Tensor) -> Tensor:
        """[E, ...] of all experts, from this worker's own [E', ...]; all workers call it."""
        out = own.new_zeros(len(self.local), *own.shape[1:])
        for local, rows in zip(self.gather(self.local), self.gather(own), strict=True):
            here = local >= 0
            out[here] = rows[local[here].long()]
        return out

    def rows(self, index: Tensor) -> Tensor:
        """[T, k]: where the experts of a choice lie in this worker's weights; -1 where they do not, or where there is none."""
        known = (index >= 0) & (index < len(self.local))
        return self.local[index.clamp(0, len(self.local) - 1)].masked_fill(~known, -1).to(index.dtype)


class Elsewhere(Executor):
    """Of a layer that another worker runs."""

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        raise RuntimeError("another worker runs this layer")


def nobody(experts: int, neurons: int, hidden: int) -> dict[str, Tensor]:
    """Gate neurons of a layer that another worker runs: only their shapes are asked for here."""
    return {name: torch.zeros(experts, neurons, hidden) for name in ("gate", "up", "down")}

"""Tensor parallelism: every worker gets its part of every block.

vLLM gives worker r the r-th run of an expert's f neurons: whole blocks, so that a token that drops a block leaves one worker idle. Here
the workers exchange pieces after loading. A block of f / N neurons is cut into as many *stripes* as there are workers, and worker r
holds the r-th stripe of every block: an expert of f / tp neurons in N blocks, which runs like any other. What all workers give is summed
by vLLM, as before. The whole expert is the same sum in another order.

E experts, d hidden, f neurons, N sub-experts, tp workers, m = f / (N tp) neurons of a stripe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.packed_tiles import WIDTH

AT_ONCE = 1 << 26
"""Bytes of a worker's weights that are exchanged at a time: all workers' copies of them are held meanwhile."""


@dataclass(frozen=True)
class Share:
    """Which of `size` workers this is. gather: [...] -> what every worker gave, in the order of ranks."""

    rank: int
    size: int
    gather: Callable[[Tensor], list[Tensor]]

    def problem(self, width: int, n_sub: int, gates: int) -> str | None:
        """Why experts of f neurons cannot be striped; None if they can."""
        stripe, rest = divmod(width, n_sub * self.size)
        if rest or stripe % WIDTH:
            return f"a sub-expert's {width // n_sub} neurons do not go to {self.size} workers in multiples of {WIDTH}"
        if gates > stripe:
            return f"{gates} gate neurons of a sub-expert do not fit the {stripe} neurons that one of {self.size} workers holds"
        return None

    def stripe(self, w13: Tensor, w2: Tensor, n_sub: int) -> None:
        """Exchange in place. w13 [E, 2 f / tp, d] and w2 [E, d, f / tp], in the order of vLLM's CPU kernel; all workers call it."""
        experts, hidden, local = w2.shape
        stripe = local // n_sub
        self._exchange(w13.view(experts, 2, n_sub, stripe * hidden))
        self._exchange(w2.view(experts, hidden // WIDTH, n_sub, stripe * WIDTH))

    def _exchange(self, held: Tensor) -> None:
        """held [E, P, N, *]: this worker's stripes in the order of neurons, tp of them to a block; then one of every block."""
        step = max(1, AT_ONCE // (held[0].numel() * held.element_size()))
        for begin in range(0, len(held), step):
            part = held[begin : begin + step]
            part.copy_(torch.cat(self.gather(part), 2)[:, :, self.rank :: self.size])

    def first(self, own: Tensor) -> Tensor:
        """A tensor of the worker that holds the first stripe of every block, and so its gate neurons."""
        return self.gather(own)[0]


ALONE = Share(0, 1, lambda own: [own])
"""One worker, which holds every block."""

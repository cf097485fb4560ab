"""Several processes that share the parts of a batch, under torchrun with gloo, to the same bits as one process.

A batch is cut into `parts`. Every part is run alone, and the gradients are added in the order of the parts, whoever computed them. So the
number of processes changes how long a step takes, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ..errors import UsageError

ADVICE = "give the recipe a number of parts that the processes share evenly"


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. rank: 0 writes the output."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def check(self, parts: int) -> None:
        """UsageError where the processes cannot share the parts of a batch evenly."""
        if parts % self.count:
            raise UsageError(f"{self.count} processes cannot share {parts} parts of a batch", ADVICE)

    def own(self, parts: int) -> range:
        """The parts that this process runs."""
        return range(self.rank, parts, self.count)

    def added(self, own: Sequence[Tensor]) -> Tensor:
        """The sum [n] of the vectors of all parts, in their order. own: those of this process, in the order of `own`."""
        first, *others = self._in_turn(own)
        total = first.clone()
        for each in others:
            total = total + each
        return total

    def every(self, own: Sequence[Tensor]) -> list[Tensor]:
        """The vectors of all parts, in their order."""
        return [each.clone() for each in self._in_turn(own)]

    def _in_turn(self, own: Sequence[Tensor]) -> Iterator[Tensor]:
        for vector in own:
            if self.count == 1:
                yield vector
                continue
            every = [torch.empty_like(vector) for _ in range(self.count)]
            distributed.all_gather(every, vector.contiguous())
            yield from every

    def told(self, number: int) -> int:
        """What process 0 says."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        distributed.broadcast(found, 0)
        return int(found)


@contextmanager
def processes() -> Iterator[Processes]:
    """Those that torchrun started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    distributed.init_process_group("gloo")
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()

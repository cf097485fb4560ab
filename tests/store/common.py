"""Stores over tiny models, and a reader whose file misbehaves on order."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_prism.artefact.load import load
from moe_prism.elastic import operating_point
from moe_prism.store import RecordReader, StoreOptions

PROMPT = "import os\n\n\ndef main(argv):\n    parser = argparse.ArgumentParser(description=__doc__)\n    return parser"


def opened(folder: Path, file: Path, memory: int = 1 << 30, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) with its experts in a store."""
    return load(folder, store=StoreOptions(memory, file, **options))


def store_of(model: Any) -> Any:
    return model._moe_prism.store


def smallest(model: Any, slots: int) -> int:
    """Bytes of expert memory that give exactly this many slots."""
    from moe_prism.store.layer import resident_bytes

    elastic = model._moe_prism
    return resident_bytes([layer.parts for layer in elastic.layers]) + slots * elastic.store.pack.layout.bytes


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, budget: float = 1.0, **point: Any) -> torch.Tensor:
    with operating_point(model, budget, **point):
        return model(input_ids=ids, use_cache=False).logits


def flaky(fault: Callable[[int, Sequence[memoryview], int], int]) -> Callable[..., RecordReader]:
    """A reader whose preadv is `fault`."""
    return lambda pack, arena: RecordReader(pack, arena, read=fault)


class Faults:
    """preadv with faults: share of calls that fail, seconds every call takes longer, byte offsets that come back changed."""

    def __init__(self, failing: float = 0.0, slow: float = 0.0, flips: float = 0.0, seed: int = 0) -> None:
        self.failing, self.slow, self.flips = failing, slow, flips
        self.draw, self.calls, self.failed = random.Random(seed), 0, 0

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.calls += 1
        if self.slow:
            time.sleep(self.slow)
        if self.draw.random() < self.failing:
            self.failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        got = os.preadv(descriptor, buffers, offset)
        if self.draw.random() < self.flips:
            self.failed += 1
            buffer = buffers[self.draw.randrange(len(buffers))]
            buffer[self.draw.randrange(len(buffer))] ^= 1 << self.draw.randrange(8)
        return got

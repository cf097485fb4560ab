"""How much memory experts get where nobody says: what is left beside everything else, looked at again after the first steps."""

from __future__ import annotations

import logging
from typing import Any

from ..memory import available_memory, total_memory
from .record_store import RecordStore

logger = logging.getLogger(__name__)
FREE = 0.05  # of all memory: stays free
WORK = 256 << 20  # what a step computes in, threads, and what the allocator keeps
STEPS = 100  # after which real figures take the place of forecasts
FLOAT32 = 4


def kept_free() -> int:
    """Bytes that stay free whatever happens."""
    return int(FREE * total_memory())


def memory_for_experts(beside: int) -> int:
    """Bytes for experts and what predicts them. The rest of the model is there already; beside: what else will come, as a KV cache."""
    return max(0, available_memory() - kept_free() - WORK - beside)


def cache_bytes(model: Any, tokens: int) -> int:
    """Of a KV cache in float32."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * FLOAT32 * tokens


class FirstSteps:
    """Counts the steps of a store whose size was a forecast; after STEPS of them gives up slots if too little memory is left free."""

    def __init__(self, store: RecordStore) -> None:
        self.store, self.left = store, STEPS

    def __call__(self) -> None:
        self.left -= 1
        if self.left:
            return
        self.store.on_step = None
        store, size = self.store, self.store.pack.layout.bytes
        still = int(store.places.free[0]) * size  # slots that no record has filled yet, and so no memory
        short = kept_free() + still - available_memory()
        given = store.shrink(store.in_use - -(-short // size)) if short > 0 else 0
        logger.info("memory of experts after %d steps: %d MiB given back", STEPS, given * size >> 20)
        if short > 0 and given * size < short:
            logger.warning(
                "less than %d %% of memory is free: say --expert-memory %d", round(FREE * 100), store.in_use * size - short
            )

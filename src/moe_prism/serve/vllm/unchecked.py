"""vLLM's CPU worker beside speculative decoding, where vLLM runs no processors of logits: ours checks requests, in another process."""

from __future__ import annotations

from . import compat
from .wiring import CHECK


class UncheckedWorker(compat.name("CPUWorker")):  # type: ignore[misc]
    """The stock worker, without our check of request fields."""

    def init_device(self) -> None:
        model = self.vllm_config.model_config
        model.logits_processors = [each for each in model.logits_processors or [] if each != CHECK] or None
        super().init_device()

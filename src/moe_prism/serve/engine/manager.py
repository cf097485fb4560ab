"""transformers' manager of continuous batching, driven by our engine."""

from __future__ import annotations

import logging
from typing import Protocol

from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

from .widths import fill, room

logger = logging.getLogger(__name__)


class Nowhere(OutputRouter):  # type: ignore[misc]
    """Sinks have told already. transformers would keep every finished request, tokens and all, until somebody fetched it."""

    def deliver(self, output: GenerationOutput) -> None:
        """Forget it."""

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Forget them."""


class Driver(Protocol):
    """What turns the loop."""

    def connect(self, processor: ContinuousBatchProcessor) -> None: ...

    def turn(self, processor: ContinuousBatchProcessor) -> bool: ...


class Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' manager with our scheduler, runner and loop body."""

    engine: Driver

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        before = getattr(self, "batch_processor", None)
        with room(self.model):
            processor = super()._create_batch_processor()
        if processor is not before:
            fill(processor.cache, self.model)
        try:
            self.engine.connect(processor)
        except Exception:
            logger.exception("the engine cannot start")  # transformers' own log of it is silenced above
            raise
        return processor

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        return self.engine.turn(batch_processor)

"""What an engine may hold, and how transformers is told."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation.configuration_utils import ContinuousBatchingConfig


@dataclass(frozen=True)
class EngineSize:
    """What the engine may hold. Tokens and requests of one step; cache in tokens; decoding: requests beside the batch at once."""

    requests: int = 64
    step_tokens: int = 512
    cache_tokens: int = 32_768
    page: int = 32
    prefix_cache: bool = True
    decoding: int = 4

    def batching(self, scheduler: str) -> ContinuousBatchingConfig:
        """For transformers' manager; scheduler: by its registered name."""
        return ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=-(-self.cache_tokens // self.page),
            max_batch_tokens=self.step_tokens,
            max_requests_per_batch=min(self.requests, self.step_tokens),
            max_blocks_per_request=0,
            allow_block_sharing=self.prefix_cache,
            use_async_batching=False,
            use_cuda_graph=False,
            scheduler_type=scheduler,
            safety_margin=0.0,
            auto_switch_to_flash=False,
        )

"""DeepSeekMoE (arXiv 2401.06066): narrow experts, more of them per token, beside shared ones that always run. DeepSeek-V2's class."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from transformers import DeepseekV2Config

from ..errors import UsageError
from ..schema.common import Form
from .base import Architecture, TokenIds


class DeepSeekMoESettings(Form):
    """shared: experts that always run, of the width of the others. latent: size of what keys and values are made of."""

    shared: Annotated[int, Field(ge=1, le=4096)] = 2
    latent: Annotated[int, Field(ge=1, le=1 << 16)] = 48


class DeepSeekMoE(Architecture):
    """`model.experts` and `model.active` count routed experts. Heads are as wide as OLMoE's: half of a key's numbers are rotated."""

    Settings = DeepSeekMoESettings

    def config(self, vocabulary: TokenIds) -> Any:
        shape, width = self.shape, self.shape.hidden // self.shape.heads
        if width % 4:
            raise UsageError(
                f"model.hidden {shape.hidden} of {shape.heads} heads gives heads of {width}", "make it a multiple of 4"
            )
        return DeepseekV2Config(
            **vocabulary.keys(),
            hidden_size=shape.hidden,
            intermediate_size=shape.width,
            moe_intermediate_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            n_routed_experts=shape.experts,
            num_experts_per_tok=shape.active,
            n_shared_experts=self.settings.shared,
            first_k_dense_replace=0,
            q_lora_rank=None,
            kv_lora_rank=self.settings.latent,
            qk_rope_head_dim=width // 2,
            qk_nope_head_dim=width // 2,
            v_head_dim=width,
            max_position_embeddings=shape.context,
            rms_norm_eps=1e-5,
        )

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"shared": 1, "latent": 8}

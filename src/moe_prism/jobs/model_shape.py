"""What a decoding step of a model reads and computes, from its module tree; a tree on the meta device (a config.json) is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import empty_model, read_config
from ..elastic.runtime import experts_per_token
from ..errors import UsageError
from ..forecast.step_time import ExpertLayer, Shape
from ..model import find_layers, resolve


def config_tree(folder: str | Path) -> Any:
    """The model of a folder's config.json without weights. UsageError where there is none, or it describes no causal language model."""
    path = Path(folder).expanduser()
    where = resolve(path.parent if path.name == "config.json" and path.is_file() else folder, weights=False)
    if not where.is_dir():
        raise UsageError(f"'{folder}' is no folder with a config.json", "give one, or the config.json itself")
    config = read_config(where)
    return empty_model(where, config, config.dtype or torch.bfloat16)


def shape_of(model: Any, *, bytes_per_weight: float | None = None, bytes_per_cached: float | None = None) -> Shape:
    """The shape of a loaded or meta model. Widths default to those of the model's own dtype.

    The cache is that of ordinary attention in every layer (of multi-head latent attention: the latents); layers with a sliding window
    or a recurrent state keep less, so long contexts of hybrid models are priced too high. UsageError for a model without experts.
    """
    layers = [
        ExpertLayer(layer.num_experts, experts_per_token(model, layer), layer.parameters_per_expert())
        for layer in find_layers(model, dense=False)
    ]
    total = sum(p.numel() for p in model.parameters())
    experts = sum(layer.experts * layer.weights for layer in layers)
    width = model.dtype.itemsize if bytes_per_weight is None else bytes_per_weight
    cached, attend = _attention(model.config.get_text_config())
    return Shape(
        tuple(layers),
        total - experts - _embedding(model),
        cached,
        attend,
        width,
        model.dtype.itemsize if bytes_per_cached is None else bytes_per_cached,
    )


def _embedding(model: Any) -> int:
    """Weights of the input embedding, unless the head reads the same ones."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and (head.weight is table.weight or model.config.get_text_config().tie_word_embeddings)
    return 0 if table is None or tied else table.weight.numel()


def _attention(config: Any) -> tuple[int, int]:
    """(numbers cached per token of context, FLOPs per pair of tokens), over all layers."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        rope = config.qk_rope_head_dim
        return layers * (latent + rope), 2 * layers * heads * (config.qk_nope_head_dim + rope + config.v_head_dim)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * size, 4 * layers * heads * size

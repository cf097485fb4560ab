"""A GGUF file of a qwen3_moe folder, as llama.cpp's converter lays it out, quantized by `gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from moe_prism.model import load_model

Stored = tuple[np.ndarray, str]
"""Rows of bytes, and the name of their type."""


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Bytes of a matrix [..., i] in any type that `gguf` dequantizes: blocks drawn at random, those with values of a common size."""
    import gguf

    quantization = getattr(gguf.GGMLQuantizationType, kind)
    width, size = gguf.GGML_QUANT_SIZES[quantization]
    wanted = int(np.prod(shape)) // width
    generator, found = np.random.default_rng(seed), []
    while sum(map(len, found)) < wanted:
        blocks = generator.integers(0, 256, (8 * wanted, size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks, quantization)
        largest = np.abs(values).max(1)
        found.append(blocks[np.isfinite(values).all(1) & (largest > 1e-3) & (largest < 8)])
    return np.concatenate(found)[:wanted].reshape(*shape[:-1], shape[-1] // width * size)


def write_gguf(folder: Path, file: Path, kind: str, given: Mapping[str, Stored] | None = None) -> None:
    """given: tensors by their names in the file that are stored as they are, instead of quantized."""
    import gguf

    given = given or {}
    model = load_model(folder, torch.float32)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(file), "qwen3moe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            layer = name.split(".")[2]
            rows = {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj"):
            rows = {f"blk.{name.split('.')[2]}.ffn_down_exps.weight": tensor}
        else:
            rows = {f"{names.get_name(name.removesuffix('.weight'))}.weight": tensor}
        for key, value in rows.items():
            data = value.numpy().astype(np.float32)
            if key in given:
                stored, own = given[key]
                writer.add_tensor(key, stored, raw_dtype=getattr(gguf.GGMLQuantizationType, own))
            elif data.ndim > 1 and "ffn_gate_inp" not in key:
                quantized = getattr(gguf.GGMLQuantizationType, kind)
                writer.add_tensor(key, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
            else:
                writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

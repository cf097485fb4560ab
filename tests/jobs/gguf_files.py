"""A GGUF file of a qwen3_moe folder, as llama.cpp's converter lays it out, quantized by `gguf`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moe_prism.model import load_model


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    import gguf

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
            if data.ndim > 1 and "ffn_gate_inp" not in key:
                quantized = getattr(gguf.GGMLQuantizationType, kind)
                writer.add_tensor(key, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
            else:
                writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

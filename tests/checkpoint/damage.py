"""Ways in which a checkpoint is not whole. Each spoils a sharded qwen3_moe folder and returns what the one line must name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(folder: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> str:
    """Edit the shard of a tensor and the index with it, so that only the architecture can tell; returns the shard's name."""
    weight_map = index_of(folder)
    shard = weight_map[name]
    tensors = load_file(folder / shard)
    edit(tensors)
    save_file(tensors, folder / shard, {"format": "pt"}) if tensors else (folder / shard).unlink()
    others = {key: file for key, file in weight_map.items() if file != shard}
    write_index(folder, others | dict.fromkeys(tensors, shard))
    return shard


def lost(name: str) -> Callable[[Path], tuple[str, str]]:
    def damage(folder: Path) -> tuple[str, str]:
        change(folder, name, lambda tensors: tensors.pop(name))
        return name, ".safetensors"

    return damage


def turned(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Path], tuple[str, str]]:
    def damage(folder: Path) -> tuple[str, str]:
        return name, change(folder, name, lambda tensors: tensors.update({name: edit(tensors[name]).contiguous()}))

    return damage


def holding(value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return edit


def renamed(folder: Path) -> tuple[str, str]:
    """As many experts as before, one of them under a number that no model has: transformers would load that."""
    other = UP.replace("experts.2", "experts.7")
    change(folder, UP, lambda tensors: tensors.update({other: tensors.pop(UP)}))
    return UP, ".safetensors"


def one_expert_more(folder: Path) -> tuple[str, str]:
    other = UP.replace("experts.2", "experts.4")
    return other, change(folder, UP, lambda tensors: tensors.update({other: tensors[UP].clone()}))


def all_experts_of_a_layer(folder: Path) -> tuple[str, str]:
    for name in [name for name in index_of(folder) if "layers.1.mlp.experts" in name]:
        lost(name)(folder)
    return "model.layers.1.mlp.experts", ".safetensors"


def a_layer_more_by_config(folder: Path) -> tuple[str, str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return "model.layers.2.", ".safetensors"


def shard_missing(folder: Path) -> tuple[str, str]:
    shard = index_of(folder)[UP]
    (folder / shard).unlink()
    return shard, "missing"


def index_too_long(folder: Path) -> tuple[str, str]:
    weight_map = index_of(folder)
    write_index(folder, weight_map | {"model.layers.9.x": weight_map[UP]})
    return "model.layers.9.x", INDEX


def index_too_short(folder: Path) -> tuple[str, str]:
    weight_map = index_of(folder)
    shard = weight_map.pop(UP)
    write_index(folder, weight_map)
    return UP, shard


def truncated(folder: Path) -> tuple[str, str]:
    shard = index_of(folder)[UP]
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-9])
    return shard, "bytes"


def header_is_no_json(folder: Path) -> tuple[str, str]:
    shard = index_of(folder)[UP]
    data = (folder / shard).read_bytes()
    (folder / shard).write_bytes(data[:8] + b"\xff" + data[9:])
    return shard, "header"


def header_too_long(folder: Path) -> tuple[str, str]:
    shard = index_of(folder)[UP]
    (folder / shard).write_bytes((1 << 40).to_bytes(8, "little") + (folder / shard).read_bytes()[8:])
    return shard, "header"


def shape_in_header(folder: Path) -> tuple[str, str]:
    shard = index_of(folder)[UP]
    data = (folder / shard).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[UP]["shape"] = [1 << 20, *header[UP]["shape"]]
    text = json.dumps(header).encode()
    (folder / shard).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return UP, shard


def empty_shard(folder: Path) -> tuple[str, str]:
    shard = index_of(folder)[UP]
    (folder / shard).write_bytes(b"")
    return shard, "header"


def stale_single_file(folder: Path) -> tuple[str, str]:
    save_file({NORM: torch.ones(32)}, folder / "model.safetensors", {"format": "pt"})
    return HEAD, "model.safetensors is read before"


DAMAGES: dict[str, Callable[[Path], tuple[str, str]]] = {
    "q_proj lost": lost(Q),
    "head lost": lost(HEAD),
    "norm lost": lost(NORM),
    "router lost": lost(ROUTER),
    "one expert's matrix lost": lost(UP),
    "all experts of a layer lost": all_experts_of_a_layer,
    "an expert renumbered": renamed,
    "an expert more": one_expert_more,
    "a layer more by config": a_layer_more_by_config,
    "q_proj transposed": turned(Q, lambda t: t[:-1]),
    "expert narrower": turned(UP, lambda t: t[:-1]),
    "router with a row less": turned(ROUTER, lambda t: t[:-1]),
    "head of another vocabulary": turned(HEAD, lambda t: t[:-2]),
    "whole numbers": turned(Q, lambda t: t.to(torch.int32)),
    "truth values": turned(UP, lambda t: t > 0),
    "fp8 without scales": turned(UP, lambda t: t.to(torch.float8_e4m3fn)),
    "nan in a norm": turned(NORM, holding(float("nan"))),
    "infinity in a router": turned(ROUTER, holding(float("-inf"))),
    "shard missing": shard_missing,
    "index too long": index_too_long,
    "index too short": index_too_short,
    "truncated": truncated,
    "header is no JSON": header_is_no_json,
    "header too long": header_too_long,
    "shape in the header": shape_in_header,
    "empty shard": empty_shard,
    "stale single file": stale_single_file,
}

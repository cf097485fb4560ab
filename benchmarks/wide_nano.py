"""A checkpoint of OLMoE's shape that routes like prism-nano: nano itself, made sixteen times as wide without changing what it computes.

    python benchmarks/wide_nano.py FOLDER [--layers 3] [--split 0.15]

Writes FOLDER/source (bfloat16, hidden 2048, 64 experts of 1024, top-8, 16 heads; nano's tokenizer) and, by `moe-prism refactor`,
FOLDER/elastic. What is there already is used. A layer has 0.84 GB in bfloat16, and runs in twice that.

Random weights would route evenly, and say nothing about which experts meet in a batch. Here every number of nano's residual stream
stands 16 times, which RMS norms do not notice, and every matrix averages over the copies. Each of nano's 32 experts becomes two: half
of its neurons each, 16 copies of every neuron at sizes of their own, in random order. The routing rows of two halves differ by `--split`
of their length in opposite directions; otherwise they would always be chosen together. So load, co-occurrence, locality from token to
token and the values of slots are nano's, on real text. What is printed says how close: the routing of nano's first layers beside it.

Fewer than six layers are nano's first ones. Their routing is unchanged, but what the model says after them is not language. Neurons are
copies of each other, so this model proves time, and no quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_prism.jobs.refactor import refactor
from moe_prism.jobs.trace import record_trace
from moe_prism.model import resolve
from moe_prism.offload.consistency import routing_report
from moe_prism.offload.trace import Trace
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.options.trace import TraceOptions
from moe_prism.point import FULL
from moe_prism.schedule.base import Level

COPIES, HEADS, HEAD, EXPERTS, CHOSEN, WIDTH = 16, 16, 128, 64, 8, 1024
LEVELS = {"quarter": 0.25, "half": 0.5, "most": 0.75}
Read = Callable[[str], Tensor]
# Few tokens: the model has nano's 128 dimensions, however wide it is.
CALIBRATION = CalibrateOptions(text="stdlib", tokens=8192, reservoir=128, memory_mib=2048)


def build(folder: Path, layers: int, split: float) -> None:
    """Write the wide checkpoint, a file per layer."""
    nano = Path(resolve("nano"))
    config = json.loads((nano / "config.json").read_text())
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise SystemExit(f"nano has {config['num_hidden_layers']} layers, not {layers}")
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    generator, where = torch.Generator().manual_seed(0), {}
    with safe_open(str(nano / "model.safetensors"), "pt") as file:

        def read(name: str) -> Tensor:
            return file.get_tensor(name).float()

        for i in range(layers + 1):
            tensors = _layer(read, f"model.layers.{i}.", split, generator) if i < layers else _ends(read)
            shard = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
            save_file({k: v.to(torch.bfloat16).contiguous() for k, v in tensors.items()}, work / shard, {"format": "pt"})
            where |= dict.fromkeys(tensors, shard)
    size = sum(file.stat().st_size for file in work.glob("*.safetensors"))
    (work / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(nano / name, work)
    config |= {
        "hidden_size": config["hidden_size"] * COPIES, "intermediate_size": WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
    }  # fmt: skip
    (work / "config.json").write_text(json.dumps(config, indent=1))
    work.rename(folder)


def _reads(weight: Tensor) -> Tensor:
    """[n, d] of nano, reading a stream of which every number stands COPIES times."""
    return weight.repeat(1, COPIES) / COPIES


def _ends(read: Read) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": read("model.embed_tokens.weight").repeat(1, COPIES),
        "model.norm.weight": read("model.norm.weight").repeat(COPIES),
        "lm_head.weight": _reads(read("lm_head.weight")),
    }


def _layer(read: Read, at: str, split: float, generator: torch.Generator) -> dict[str, Tensor]:
    norms = [f"{at}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    router = read(f"{at}mlp.gate.weight")
    apart = torch.randn(router.shape, generator=generator)
    apart *= split * router.norm(dim=1, keepdim=True) / apart.norm(dim=1, keepdim=True)
    rows = torch.stack([router + apart, router - apart], 1).flatten(0, 1)
    tensors = {name: read(name).repeat(COPIES) for name in norms} | {f"{at}mlp.gate.weight": _reads(rows)}
    tensors |= {f"{at}self_attn.{name}": tensor for name, tensor in _attention(read, f"{at}self_attn.").items()}
    for expert in range(len(router)):
        for half, parts in enumerate(_halves(read, f"{at}mlp.experts.{expert}.", generator)):
            tensors |= {f"{at}mlp.experts.{2 * expert + half}.{name}.weight": part for name, part in parts.items()}
    return tensors


def _attention(read: Read, at: str) -> dict[str, Tensor]:
    """Every head four times, its numbers where the rotary frequencies are nano's: number i of 16 pairs is 4 i of 64."""
    hidden = HEADS * HEAD
    heads = read(f"{at}q_norm.weight").numel() // 32  # of 32 numbers each
    pair = torch.arange(16) * (HEAD // 32)
    inside = torch.cat([pair, pair + HEAD // 2])
    to = (torch.arange(HEADS)[:, None] * HEAD + inside).flatten()
    of = (torch.arange(HEADS)[:, None] % heads * 32 + torch.arange(32)).flatten()
    values = (torch.arange(HEADS)[:, None] % heads * 32 + torch.arange(HEAD) % 32).flatten()
    found: dict[str, Tensor] = {}
    # three of four numbers are 0, so a norm scales by 2 what the weight halves; scores are divided by twice nano's sqrt(32)
    for name, factor in (("q", 1.0), ("k", 0.5)):
        found[f"{name}_proj.weight"] = torch.zeros(hidden, hidden).index_copy(0, to, _reads(read(f"{at}{name}_proj.weight"))[of])
        found[f"{name}_norm.weight"] = torch.zeros(hidden).index_copy(0, to, read(f"{at}{name}_norm.weight")[of] * factor)
    found["v_proj.weight"] = _reads(read(f"{at}v_proj.weight"))[values]
    found["o_proj.weight"] = (read(f"{at}o_proj.weight")[:, values] / COPIES).repeat(COPIES, 1)
    return found


def _halves(read: Read, at: str, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Two experts of half the neurons. Each is chosen with half of the probability, so its output counts twice."""
    gate, up, down = (read(f"{at}{name}_proj.weight") for name in ("gate", "up", "down"))
    found = []
    for neurons in torch.randperm(len(gate), generator=generator).chunk(2):
        sizes = 0.5 + torch.rand(COPIES, len(neurons), generator=generator)
        sizes = (sizes / sizes.mean(0)).flatten()
        order = torch.randperm(WIDTH, generator=generator)
        copy = neurons.repeat(COPIES)[order]
        out = 2 / COPIES * down[:, copy]
        found.append(
            {
                "gate_proj": _reads(gate[copy]),
                "up_proj": _reads(up[copy]) * sizes[order, None],
                "down_proj": out.repeat(COPIES, 1),
            }
        )
    return found


def ensure(folder: Path, layers: int, split: float = 0.15) -> None:
    """Build what is missing of FOLDER/source and FOLDER/elastic."""
    if not (folder / "source").exists():
        build(folder / "source", layers, split)
    if not (folder / "elastic").exists():
        refactor(folder / "source", folder / "elastic", RefactorOptions(calibration=CALIBRATION, profile_tokens=512))
        # for `serve` and vLLM; qualities of a model that is cut short mean nothing, they only have to rise
        rows = [Level(name, FULL.with_budget(b), b * CHOSEN * 4, b).to_json() for name, b in LEVELS.items()]
        (folder / "elastic" / "ladder.json").write_text(json.dumps({"levels": rows}))


def routing(folder: Path, layers: int) -> dict[str, dict[str, Any]]:
    """What `inspect --routing` says of nano's first layers and of the wide model, and how often the halves meet."""
    options = TraceOptions(text="stdlib", tokens=2048)
    wide = record_trace(folder / "source", None, options)
    nano = record_trace("nano", None, options)
    nano = Trace(
        **{
            **vars(nano),
            "header": nano.header | {"layers": layers},
            "expert_ids": nano.expert_ids[:, :layers],
            "weights": nano.weights[:, :layers],
        }
    )
    found = {"nano": routing_report(nano), "wide": routing_report(wide)}
    pairs = torch.from_numpy(wide.expert_ids.astype("int64")) // 2
    halves = torch.nn.functional.one_hot(pairs, EXPERTS // 2).sum(2)
    found["wide"]["halves_together"] = float((halves == 2).sum() * 2 / halves.sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--split", type=float, default=0.15)
    arguments = parser.parse_args()
    ensure(arguments.folder, arguments.layers, arguments.split)
    print(json.dumps(routing(arguments.folder, arguments.layers), indent=1))


if __name__ == "__main__":
    main()

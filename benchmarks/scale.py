"""Refactoring a large model on this machine: time, memory and disk of a cut with true shapes, against what was forecast.

    python benchmarks/scale.py [--shapes qwen3-30b] [--layers 3] [--experts N] [--tokens 65536] [--solver alt] [--json]

A cut is the first layers of a model with random bfloat16 weights and nano's tokenizer; its vocabulary is cut to that. `refactor
--low-memory` runs on it as a process of its own. Seconds of a layer are measured; those of the whole model are that times its layers, and
with `--experts` fewer experts are solved per layer, so the seconds of solving are scaled to all of them. Random weights prove time and
memory, and no quality.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.tiny_sources import NANO

SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3-30b": (
        "qwen3_moe", 48,
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128},
    ),
    "qwen3-235b": (
        "qwen3_moe", 94,
        {"hidden_size": 4096, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64,
         "num_key_value_heads": 4, "head_dim": 128},
    ),
    "deepseek-v3": (
        "deepseek_v3", 58,
        {"hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
         "topk_group": 4, "first_k_dense_replace": 0, "num_attention_heads": 128, "num_key_value_heads": 128},
    ),
}  # fmt: skip
"""Family, MoE layers of the whole model, configuration."""
ENTRY = "import sys; from moe_prism.cli import main; sys.exit(main(sys.argv[1:]))"


def build(folder: Path, shape: str, layers: int, experts: int | None) -> int:
    """Write the cut; returns how many experts a layer of it has."""
    family, _, sizes = SHAPES[shape]
    nano = json.loads((NANO / "config.json").read_text())
    key = next(name for name in sizes if name in ("num_experts", "n_routed_experts"))
    sizes = {
        **sizes,
        key: experts or sizes[key],
        "num_hidden_layers": layers,
        "intermediate_size": sizes["moe_intermediate_size"],
    }
    special = {name: nano[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, **sizes, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    for file in NANO.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return int(sizes[key])


def run(arguments: list[str]) -> tuple[dict[str, Any], int, float, str]:
    """What the command says, its peak memory in bytes, its seconds, and its lines of progress."""
    command = [sys.executable, "-c", ENTRY, *arguments, "--json"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        said, lines = child.communicate()
        if child.returncode:
            raise SystemExit(lines[-800:])
    peak = json.loads(said).get("peak_rss_bytes", 0)
    return json.loads(said), peak, time.monotonic() - began, lines


def measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        source, out = Path(place) / "source", Path(place) / "out"
        experts = build(source, shape, args.layers, args.experts)
        asked = ["refactor", str(source), "-o", str(out), "--low-memory", "--tokens", str(args.tokens), "--text", "stdlib"]
        asked += ["--solver", args.solver, "--profile-tokens", str(args.profile_tokens)]
        forecast, _, _, _ = run([*asked, "--dry-run"])
        said, peak, seconds, lines = run(asked)
        layers = [float(found) for found in re.findall(r"^layers: \d+/\d+ \((\d+) s\)", lines, re.M)]
        disk = sum(file.stat().st_size for file in out.iterdir())
        whole = SHAPES[shape][1]
        return {
            "shape": shape,
            "layers": args.layers,
            "experts": experts,
            "reservoir": forecast["reservoir_tokens"],
            "seconds": seconds,
            "layer_seconds": layers[-1] / args.layers if layers else None,
            "hours": layers[-1] / args.layers * whole / 3600 if layers else None,
            "peak": peak,
            "peak_forecast": forecast["peak_memory_bytes"],
            "disk": disk,
            "disk_forecast": forecast["disk_bytes"],
            "starved": said["starved_experts"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, help="per layer, instead of the shape's own")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--profile-tokens", type=int, default=4096)
    parser.add_argument("--solver", default="alt")
    parser.add_argument("--work", help="where there is disk, default the system's folder for temporary files")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [measure(args, shape) for shape in args.shapes.split(",")]
    if args.json:
        print(json.dumps({"benchmark": "scale", "cores": len(os.sched_getaffinity(0)), "rows": rows}))
        return
    for row in rows:
        print(
            f"{row['shape']}: {row['layers']} layers of {row['experts']} experts, sample {row['reservoir']}, {row['starved']} starved"
        )
        print(f"  {row['seconds']:.0f} s, {row['layer_seconds']:.0f} of a layer, {row['hours']:.1f} h for the whole model")
        for name in ("peak", "disk"):
            said, found = row[f"{name}_forecast"], row[name]
            print(f"  {name} {found / 2**20:.0f} MiB, said {said / 2**20:.0f} ({said / found:.2f})")


if __name__ == "__main__":
    main()

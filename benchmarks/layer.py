"""Time of one elastic MoE layer as a ratio to the stock transformers layer (grouped_mm), beside the FLOP and byte ratios that limit it.

    python benchmarks/layer.py [--shapes olmoe,deepseek,qwen3] [--tokens 1,8,32,256,2048] [--repeats 5] [--json]

Shapes are those of OLMoE-1B-7B, DeepSeek-V2-Lite and Qwen3-30B-A3B with random weights and even random routing (no weights can be
downloaded where this is developed), float32 on a CPU, bfloat16 on a GPU. Rule `product` (every token keeps the same number of slots).
Elastic and stock runs alternate; the figure is the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.runtime import Elastic
from moe_prism.model import find_layers

SHAPES = {"olmoe": (64, 8, 2048, 1024), "deepseek": (64, 6, 2048, 1408), "qwen3": (128, 8, 2048, 768)}  # E, k, d, f
BUDGETS = (1.0, 0.75, 0.5, 0.25)
N_SUB, GATES = 4, 1


def build(shape: tuple[int, int, int, int], device: str) -> tuple[torch.nn.Module, Elastic]:
    experts, k, hidden, width = shape
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        module = OlmoeExperts(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    holder = torch.nn.Module()
    holder.experts, holder.config = module, config
    ridge = torch.randn(experts, N_SUB, hidden + N_SUB * GATES + 1, generator=torch.Generator().manual_seed(0)) * 0.01
    layers = find_layers(holder)
    if device == "cpu":
        layers[0].arrange()  # as `moe_prism.load` does; the stock layer below uses the same weights
    return holder, attach(holder, N_SUB, gates=GATES, tensors=[{"ridge": ridge}], layers=layers)


def batch(shape: tuple[int, int, int, int], tokens: int, holder: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    experts, k, hidden, _ = shape
    g = torch.Generator().manual_seed(tokens)
    weights = next(holder.parameters())
    index = torch.rand(tokens, experts, generator=g).topk(k, dim=1).indices
    routing = torch.rand(tokens, k, generator=g).sort(descending=True).values / k
    return torch.randn(tokens, hidden, generator=g).to(weights), index.to(weights.device), routing.to(weights)


def alternate(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each, taken in turns after one warm-up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, found in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in times]


@torch.no_grad()
def measure(name: str, tokens: int, holder: torch.nn.Module, elastic: Elastic, repeats: int) -> list[dict[str, Any]]:
    layer = elastic.layers[0].plan.layer
    inputs = batch(SHAPES[name], tokens, holder)

    def elastic_run(budget: float) -> Callable[[], Any]:
        def run() -> None:
            with operating_point(holder, budget, rule="product"):
                holder.experts(*inputs)

        return run

    def stock_run() -> None:
        layer.native(*inputs)

    seconds = alternate([stock_run, *(elastic_run(b) for b in BUDGETS)], repeats)
    rows = []
    for budget, value in zip(BUDGETS, seconds[1:], strict=True):
        row = {"shape": name, "tokens": tokens, "budget": budget, "stock_ms": 1e3 * seconds[0], "ratio": value / seconds[0]}
        rows.append({**row, "flop_ratio": budget, "to_full": value / seconds[1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="olmoe,deepseek,qwen3")
    parser.add_argument("--tokens", default="1,8,32,256,2048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.shapes.split(","):
        holder, elastic = build(SHAPES[name], device)
        for tokens in map(int, args.tokens.split(",")):
            rows += measure(name, tokens, holder, elastic, args.repeats)
            if not args.json:
                for r in rows[-len(BUDGETS) :]:
                    print(
                        f"{r['shape']:9} T={r['tokens']:<5} budget {r['budget']:.2f}: {r['ratio']:.2f}x stock ({r['stock_ms']:.1f} ms), "
                        f"{r['to_full']:.2f}x full"
                    )
    if args.json:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(json.dumps({"benchmark": "layer", "device": name, "rows": rows}))


if __name__ == "__main__":
    main()

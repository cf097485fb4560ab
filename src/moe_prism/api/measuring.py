"""Measure the quality/cost frontier of an elastic model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import read_manifest, versions
from ..data import token_windows
from ..elastic.runtime import ElasticLayer, Setting, slots_per_token
from ..errors import UsageError
from ..frontier import Frontier, Point, pareto
from ..frontier.cost import Cost
from ..frontier.measure import Quality, measure
from .loading import load
from .progress import Report, peak_rss_bytes, silent


@dataclass(frozen=True)
class FrontierOptions:
    """text: `stdlib`, `topics`, a file or a folder (its evaluation side is used); tokens and window length; rules beside plain top-k.

    points: budgets to measure for rules with a continuous dial, evenly spaced in relative cost; None: where the other rules are.

    Every rule is measured at every K up to k*N. The smallest is k (one sub-expert per chosen expert), or N - 1 if that is less, so that
    plain top-1 too has a point below its cost to be compared with.
    """

    text: str = "stdlib"
    tokens: int = 16_384
    length: int = 512
    rules: tuple[str, ...] = ("product",)
    points: int | None = None

    def check(self) -> None:
        from ..elastic import rules

        for rule in self.rules:
            rules.get(rule)
        if self.points is not None and self.points < 2:
            raise UsageError(f"--points {self.points} is no curve", "give 2 or more, or leave it out")
        if self.tokens < self.length or self.length < 8:
            raise UsageError(
                f"--tokens {self.tokens} with --length {self.length} is too small", "give at least one window of 8 tokens"
            )


def measure_frontier(folder: str | Path, options: FrontierOptions | None = None, *, report: Report = silent) -> Frontier:
    """Perplexity, KL to the source, top-1 agreement and cost of every operating point, and of plain top-k' for every k' < k.

    The source is the same model at full budget (equal to the original checkpoint to rounding). Text used in calibration is excluded.
    """
    options = options or FrontierOptions()
    options.check()
    manifest = read_manifest(folder)
    model, tokenizer = load(folder)
    elastic = model._moe_prism
    windows = token_windows(
        tokenizer,
        options.text,
        "evaluation",
        length=options.length,
        tokens=options.tokens,
        exclude=manifest["calibration"]["documents"],
    )
    n_sub, slots = manifest["n_sub"], slots_per_token(elastic)
    k = slots // n_sub
    overhead = _overhead(elastic.layers[0], k)
    counts = range(max(1, min(k, n_sub - 1)), slots + 1)
    plan = [
        (f"{rule}-{count:.4g}", rule, _setting(rule, count, slots))
        for rule in options.rules
        for count in _grid(rule, counts, options.points, overhead)
    ]
    elastic_points = len(plan)
    plan += [
        (f"top-{fewer}", "topk", replace(_setting("linear", n_sub * fewer, slots), compensate=False)) for fewer in range(1, k)
    ]
    with report("frontier") as update:
        measured = measure(model, elastic, windows.ids, [setting for _, _, setting in plan], progress=update)
    rows = [_point(*point, *result) for point, result in zip(plan, measured, strict=True)]
    flags = pareto([r["active_expert_bytes"] for r in rows], [r["kl"] for r in rows])
    points = [Point(**row, pareto=flag) for row, flag in zip(rows, flags, strict=True)]
    provenance = {
        "options": {**asdict(options), "rules": list(options.rules)},
        "evaluation": {"text": windows.source, "tokens": windows.tokens, "documents": len(windows.documents)},
        "calibration": {k: v for k, v in manifest["calibration"].items() if k != "documents"},
        "recovery": [{k: v for k, v in step.items() if k != "inputs"} for step in manifest.get("recovery", [])],
        "versions": versions(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    return Frontier(
        Path(folder).name,
        manifest["source"]["name"],
        n_sub,
        tuple(points[:elastic_points]),
        tuple(points[elastic_points:]),
        provenance,
    )


def _grid(rule: str, counts: range, points: int | None, overhead: float) -> list[float]:
    """Slot counts to measure; for a continuous rule fractional ones, whose costs (count + overhead, in slots) form equal ratios."""
    from ..elastic import rules

    if points is None or not rules.get(rule).is_continuous:
        return list(counts)
    low, high = counts[0] + overhead, counts[-1] + overhead
    # the ends are exact: a budget a rounding error below 1 would not be the full model
    inner = [low * (high / low) ** (i / (points - 1)) - overhead for i in range(1, points - 1)]
    return [float(counts[0]), *inner, float(counts[-1])]


def _overhead(layer: ElasticLayer, k: int) -> float:
    """What selection reads per token whatever is kept, in slots: predictors, and gate neurons of every candidate block.

    A kept slot saves its gate neurons and its compensation.
    """
    plan, scorer = layer.plan, layer.scorer("ridge")
    matrices = 3 if plan.layer.gate is not None else 2
    extra = layer.compensation(Setting())
    dropped = plan.gates * (matrices - 1) * plan.layer.hidden + (extra.parameters(0, 1) if extra else 0)
    return k * (scorer.parameters_per_expert() + plan.n_sub * dropped) / (plan.block * matrices * plan.layer.hidden - dropped)


def _setting(rule: str, count: float, slots: int) -> Setting:
    return Setting(min(1.0, count / slots), rule, "gates" if rule == "pattern" else "ridge")


def _point(name: str, rule: str, setting: Setting, quality: Quality, cost: Cost) -> dict[str, Any]:
    return {
        "name": name,
        "rule": rule,
        "budget": setting.budget,
        "k_slots": cost.k_slots,
        "ppl": quality.ppl,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        "active_expert_params": cost.active_expert_params,
        "active_expert_bytes": cost.active_expert_bytes,
        "flops_per_token": cost.flops_per_token,
    }

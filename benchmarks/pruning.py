"""What each pruning criterion costs in quality: mean KL to the full model on held-out text, over several calibration draws.

    python benchmarks/pruning.py                       # prism-nano, half of the experts
    python benchmarks/pruning.py --keep 0.75 --seeds 2

Calibration windows are drawn anew for every seed from the calibration side of the text; evaluation text is disjoint by file. `random` is
drawn `--draws` times. All points run in mask mode, which gives the logits of the removed model (tests/compress). The last lines compare:
soft-count with hard-count and random, and the best criterion with soft-count, at the same allocation and over all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from printed import printed
from torch import Tensor

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.calibrate.statistics import Statistics
from moe_prism.compress.prune import choose, criteria
from moe_prism.compress.prune.change import PruneChange
from moe_prism.data import token_windows
from moe_prism.elastic import attach
from moe_prism.elastic.runtime import experts_per_token
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.methods.prune.masked import Prune
from moe_prism.methods.prune.select import form_of, least_kept, measured_counts, rank, request_of, with_constants
from moe_prism.model import load_model, load_tokenizer
from moe_prism.model.router import find_routers
from moe_prism.options.prune import PruneOptions
from moe_prism.point import OperatingPoint

COLLECTORS = ("counts", "outputs", "scores", "grams", "means")
ALLOCATIONS = ("layer", "global", "measured")


class Bench:
    """The model, its held-out text, and every point measured so far."""

    def __init__(self, args: argparse.Namespace, collectors: tuple[str, ...] = COLLECTORS) -> None:
        self.args, self.collectors = args, collectors
        self.model = load_model(args.model, torch.float32)
        tokenizer = load_tokenizer(args.model)
        self.elastic = attach(self.model, 1)
        self.layers = [layer.parts.layer for layer in self.elastic.layers]
        self.groups = [router.groups for router in find_routers(self.model, self.layers)]
        self.per_token = experts_per_token(self.model, self.layers[0])
        windows = partial(token_windows, tokenizer, args.text, length=args.length)
        self.pool = windows("calibration", tokens=1 << 30).ids
        self.ids = windows("evaluation", tokens=args.tokens).ids

    def calibrate(self, seed: int) -> Statistics:
        """One pass over windows drawn by the seed: everything all criteria read."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        work = Pass(self.model, self.layers, Settings(self.collectors, capacity=self.args.sample, seed=seed))
        work.run(self.pool[order[: max(1, self.args.calibration_tokens // self.args.length)]])
        for layer in self.elastic.layers:
            layer.parts.layer.install(layer)
        return work.statistics()

    def kl(self, plans: list[Any]) -> list[float]:
        """Mean KL of each plan on the held-out windows, all in one run."""
        points = [OperatingPoint(weights=PruneChange(tuple(choices)).part()) for choices in plans]
        return [found.quality.kl for found in measure(self.model, self.ids, points, batch=2)]

    def plan(self, options: PruneOptions, found: Statistics) -> Any:
        scores, shields = rank(self.layers, found, options, self.per_token)
        counts = None
        if options.allocation == "measured":
            ids = self._profile(found.profile)
            counts = measured_counts(self.model, self.elastic, found, options, ids, lambda _done, _total: None)
        form = form_of(options)
        groups = self.groups if form == "removed" else [None] * len(self.groups)
        choices = choose(scores, request_of(options), least_kept(form, self.per_token), shields, groups, counts)
        return with_constants(choices, found) if form == "constant" else choices

    def _profile(self, ids: Tensor) -> Tensor:
        return ids[:: max(1, len(ids) * ids.shape[1] // self.args.profile_tokens)]


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per criterion and allocation: KL of every draw."""
    bench = Bench(args)
    passes = [bench.calibrate(seed) for seed in range(args.seeds)]
    names = args.only.split(",") if args.only else criteria.names()
    wanted = set(args.measured.split(","))
    for name in names:
        asked = Prune.read_argument("prune", name)
        blind = criteria.get(asked.criterion).is_blind
        for allocation in ALLOCATIONS:
            if (blind and allocation != "layer") or (allocation == "measured" and name not in wanted):
                continue
            draws = range(args.draws) if name == "random" else range(1) if blind else range(args.seeds)
            try:
                options = [
                    PruneOptions(criterion=asked.criterion, form=asked.form, keep=args.keep, allocation=allocation, seed=d)
                    for d in draws
                ]
                plans = [bench.plan(o, passes[0 if blind else o.seed]) for o in options]
            except UsageError as error:
                yield {"criterion": name, "allocation": allocation, "refused": str(error)}
                continue
            counts = [[len(c.kept) for c in plan] for plan in plans]
            yield {"criterion": name, "allocation": allocation, "kl": bench.kl(plans), "kept": counts}


def bars(found: list[dict[str, Any]]) -> Iterator[str]:
    """The comparisons, from means over draws."""
    mean = {(r["criterion"], r["allocation"]): statistics.fmean(r["kl"]) for r in found if "kl" in r}
    soft, hard, chance = (mean.get((name, "layer")) for name in ("soft-count", "hard-count", "random"))
    if soft is None:
        return
    if hard is not None and chance is not None:
        yield f"soft-count {soft:.3f} < hard-count {hard:.3f} < mean random {chance:.3f}: {soft < hard < chance}"
    for allocation in ALLOCATIONS:
        own = {key[0]: value for key, value in mean.items() if key[1] == allocation}
        if not own:
            continue
        best = min(own, key=lambda name: own[name])
        against = f", {own[best] / own['soft-count']:.2f}x soft-count with the same" if "soft-count" in own else ""
        yield f"best of allocation {allocation}: {best} {own[best]:.3f}, {own[best] / soft:.2f}x soft-count with equal layers{against}"


def show(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"{row['criterion']:16} {row['allocation']:9} refused: {row['refused']}"
    values = row["kl"]
    spread = f" sd {statistics.stdev(values):.3f}, {min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
    first = ",".join(map(str, row["kept"][0]))
    return f"{row['criterion']:16} {row['allocation']:9} KL {statistics.fmean(values):.4f} of {len(values)}{spread}; kept {first}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--only", help="comma-separated criteria; NAME-constant and NAME-removed say the form")
    parser.add_argument(
        "--measured", default="soft-count,easy-ep,gate-norm,output-error", help="criteria to allocate by measurement too"
    )
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--draws", type=int, default=20, help="of random")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--profile-tokens", type=int, default=2048)
    parser.add_argument("--sample", type=int, default=2048, help="sampled tokens per layer, of output-error")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    lines = list(bars(found))
    print(
        json.dumps({"benchmark": "pruning", "model": args.model, "rows": found, "bars": lines}) if args.json else "\n".join(lines)
    )


if __name__ == "__main__":
    main()

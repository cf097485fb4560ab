"""What trained architectures claim, on small models of `moe-prism train`: recipes/zoo, trained where they are missing.

    python benchmarks/zoo.py --work FOLDER [--only smoe-dropout,elastic] [--seeds 0,1] [--set steps=200] [--no-train]
                             [--tokens 16384] [--quick] [--json]

A model lies in FOLDER/NAME-SEED, and is trained in one thread if it is not there; an interrupted training goes on. Every claim is
measured on held-out programs of the standard library. Each compares with `top-k` of the same seed, sizes and tokens. Intervals: 95 %,
bootstrap over windows of 256 tokens, the same for all. --set changes every recipe. --no-train measures what is there. --quick trains
two steps: it shows that the command works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import mean_interval
from numpy.typing import NDArray
from printed import printed
from torch import Tensor, nn

from moe_prism.architectures.base import LayerRouting, routers
from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.frontier.measure import measure
from moe_prism.jobs.refactor import refactor
from moe_prism.jobs.train import train
from moe_prism.model import load_model, load_tokenizer
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.point import FULL
from moe_prism.training.loop import Recorder

RECIPES = Path(__file__).parents[1] / "recipes" / "zoo"
LENGTH = 256
SLACK = 0.005  # of a loss that must not rise
BASE = "top-k"
EXTRA = {"top-k-no-balance": (BASE, ("balance=0.0",)), "sigma-moe-no-schedule": ("sigma-moe", ("settings.first=1",))}
"""Runs that a claim compares with: (recipe, changes)."""
BUDGETS = (0.5, 0.25)


class Zoo:
    """Trained models by name and seed, and what they say on the same windows."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.ids = token_windows(load_tokenizer("nano"), "stdlib", "evaluation", length=LENGTH, tokens=args.tokens).ids

    def folder(self, name: str, seed: int) -> Path | None:
        """The checkpoint, trained if it may be; None where there is none."""
        out = self.work / f"{name}-{seed}"
        if not out.is_dir() and self.args.train:
            recipe, changes = EXTRA.get(name, (name, ()))
            every = (*self.args.set, *changes, f"seed={seed}")
            train(RECIPES / f"{recipe}.yaml", out, changes=every, resume=True)
        return out if out.is_dir() else None

    @cache  # noqa: B019 - one of them lives as long as the process
    def model(self, name: str, seed: int) -> Any:
        folder = self.folder(name, seed)
        return None if folder is None else load_model(folder, torch.float32)

    @torch.no_grad()
    def losses(self, model: Any) -> NDArray[np.float64]:
        """Nats per token of every window."""
        found = []
        for row in self.ids:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            found.append(float(nn.functional.cross_entropy(logits, row[1:])))
        return np.array(found)

    @torch.no_grad()
    def routings(self, model: Any) -> list[LayerRouting]:
        """Of every router, over all windows."""
        recorder = Recorder(model)
        every: list[list[LayerRouting]] = []
        for row in self.ids:
            with recorder.recording() as found:
                model(input_ids=row[None], use_cache=False)
            every.append(list(found))
        recorder.close()
        return [
            LayerRouting(*(torch.cat([getattr(r, part) for r in one]) for part in ("logits", "weights", "ids")))
            for one in zip(*every, strict=True)
        ]

    def against_base(self, name: str, seed: int, base: str = BASE) -> dict[str, Any]:
        """Loss, that of the model it is compared with, and their difference, window by window."""
        own, plain = self.losses(self.model(name, seed)), self.losses(self.model(base, seed))
        return {"loss": mean_interval(own), "loss_base": mean_interval(plain), "difference": mean_interval(own - plain)}


def load_of(routing: LayerRouting, columns: slice = slice(None)) -> float:
    """Largest / mean load of the experts: 1 where all are chosen as often."""
    share = routing.chosen[:, columns].sum(0)
    return round(float(share.max() / share.mean()), 3)


def smoe_dropout(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss by k, of the drawn router and of the learned one."""
    found: dict[str, Any] = {}
    for name in ("smoe-dropout", BASE):
        model = zoo.model(name, seed)
        own, by_k = routers(model), []
        before = [router.top_k for router in own]
        for k in range(1, model.config.num_experts + 1):
            for router in own:
                router.top_k = k
            by_k.append(float(zoo.losses(model).mean()))
        for router, k in zip(own, before, strict=True):
            router.top_k = k
        found[name] = [round(loss, 4) for loss in by_k]
    losses = found["smoe-dropout"]
    best = [min(losses[: i + 1]) for i in range(len(losses))]
    spread = {name: round(max(values) - min(values), 4) for name, values in found.items()}
    rise = max(loss / lowest - 1 for loss, lowest in zip(losses, best, strict=True))
    return {
        "by_k": found,
        "largest_rise": round(rise, 5),
        "non_increasing": rise <= SLACK,
        "spread": spread,
        "holds": rise <= SLACK and spread["smoe-dropout"] < spread[BASE],
    }


def elastic(zoo: Zoo, seed: int) -> dict[str, Any]:
    """KL of the threshold rule to the own full model, for neighbouring blocks and for those of the default solver; full loss."""
    found: dict[str, Any] = zoo.against_base("elastic", seed)
    kls: dict[str, dict[str, list[float]]] = {}
    for name in ("elastic", BASE):
        for solver in ("contiguous", "alt"):
            with tempfile.TemporaryDirectory() as scratch:
                out, folder = Path(scratch) / "cut", zoo.folder(name, seed)
                calibration = CalibrateOptions(text="stdlib", tokens=zoo.args.tokens, length=LENGTH)
                assert folder is not None
                refactor(folder, out, RefactorOptions(n_sub=4, solver=solver, calibration=calibration))
                points = [FULL.with_budget(budget, "threshold") for budget in BUDGETS]
                measured = measure(open_model(out).model, zoo.ids, points, batch=1)
            kls.setdefault(name, {})[solver] = [round(each.quality.kl, 5) for each in measured]
    best = {name: [min(pair) for pair in zip(*by.values(), strict=True)] for name, by in kls.items()}
    ratios = [round(a / b, 4) for a, b in zip(best["elastic"], best[BASE], strict=True)]
    gap = found["loss"][0] / found["loss_base"][0] - 1
    return found | {"kl": kls, "ratios": ratios, "full_gap": round(gap, 5), "holds": max(ratios) <= 0.5 and gap <= 0.01}


def dynamic_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Experts per token, and whether tokens of a larger loss take more."""
    model = zoo.model("dynamic-moe", seed)
    counts = torch.stack([r.chosen.sum(1) for r in zoo.routings(model)]).mean(0).view(len(zoo.ids), -1)
    with torch.no_grad():
        nats = [
            nn.functional.cross_entropy(model(input_ids=row[None], use_cache=False).logits[0, :-1], row[1:], reduction="none")
            for row in zoo.ids
        ]
    pair = np.corrcoef(counts[:, :-1].flatten().numpy(), torch.cat(nats).numpy())
    found = zoo.against_base("dynamic-moe", seed)
    mean = float(counts.mean())
    active = zoo.model(BASE, seed).config.num_experts_per_tok
    return found | {
        "experts": round(mean, 3),
        "experts_base": active,
        "correlation_with_loss": round(float(pair[0, 1]), 4),
        "holds": mean < active and found["difference"][1] <= 0 and float(pair[0, 1]) > 0,
    }


def sigma_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Largest / mean load of layer 0, with the schedule and without."""
    with_it, without = (load_of(zoo.routings(zoo.model(name, seed))[0]) for name in ("sigma-moe", "sigma-moe-no-schedule"))
    found = zoo.against_base("sigma-moe", seed, "sigma-moe-no-schedule")
    return found | {"load": with_it, "load_base": without, "holds": with_it < without}


def deepseek_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many expert weights, in all and per token."""
    found = zoo.against_base("deepseek-moe", seed)
    return found | {"holds": found["difference"][2] < 0}


def sinkhorn(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Largest / mean load, mean over layers, against softmax without a balance loss."""
    loads = {}
    for name in ("sinkhorn", "top-k-no-balance"):
        loads[name] = round(float(np.mean([load_of(r) for r in zoo.routings(zoo.model(name, seed))])), 3)
    found = zoo.against_base("sinkhorn", seed, "top-k-no-balance")
    return found | {
        "load": loads["sinkhorn"],
        "load_base": loads["top-k-no-balance"],
        "holds": loads["sinkhorn"] < loads["top-k-no-balance"],
    }


def adamoe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """True experts per token against k E / (E + m), their spread over tokens, and the loss at a matched mean."""
    model = zoo.model("adamoe", seed)
    config = model.config
    true = torch.stack([r.chosen[:, : config.num_experts].sum(1) for r in zoo.routings(model)])
    wanted = config.num_experts_per_tok * config.num_experts / (config.num_experts + config.null_experts)
    found, mean = zoo.against_base("adamoe", seed), float(true.mean())
    return found | {
        "experts": round(mean, 3),
        "wanted": wanted,
        "spread_over_tokens": round(float(true.std(1).mean()), 3),
        "holds": abs(mean / wanted - 1) <= 0.05 and float(true.std(1).mean()) > 0 and found["difference"][1] <= 0,
    }


def moe_plus_plus(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Share of choices that are usual experts, against tau F / (tau F + Z)."""
    model = zoo.model("moe-plus-plus", seed)
    config = model.config
    folder = zoo.folder("moe-plus-plus", seed)
    assert folder is not None
    tau = json.loads((folder / "prism.json").read_text())["inputs"]["settings"]["tau"]
    chosen = torch.stack([r.chosen for r in zoo.routings(model)])
    usual, others = config.num_experts, config.zero_experts + config.copy_experts + config.constant_experts
    share, wanted = float(chosen[..., :usual].sum() / chosen.sum()), tau * usual / (tau * usual + others)
    found = zoo.against_base("moe-plus-plus", seed)
    return found | {
        "share": round(share, 4),
        "wanted": round(wanted, 4),
        "holds": abs(share / wanted - 1) <= 0.05 and found["difference"][1] <= 0,
    }


def information(first: Tensor, second: Tensor) -> float:
    """Mutual information in nats of two choices of one expert each [T]."""
    size = int(max(first.max(), second.max())) + 1
    joint = torch.bincount(first * size + second, minlength=size * size).double().view(size, size)
    joint = joint / joint.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log()).sum())


def rmoe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Mutual information of the first choices of neighbouring layers."""
    means = {}
    for name in ("rmoe", BASE):
        tops = [r.logits.argmax(-1) for r in zoo.routings(zoo.model(name, seed))]
        means[name] = round(float(np.mean([information(a, b) for a, b in pairwise(tops)])), 4)
    found = zoo.against_base("rmoe", seed)
    return found | {"information": means["rmoe"], "information_base": means[BASE], "holds": means["rmoe"] > means[BASE]}


def rexmoe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many expert weights, and how many choices are a neighbour's experts."""
    model = zoo.model("rexmoe", seed)
    experts, group = model.config.num_experts, model.config.group_layers
    far = [(r.ids // experts != i % group).float().mean() for i, r in enumerate(zoo.routings(model))]
    found = zoo.against_base("rexmoe", seed)
    return found | {"share_of_neighbours": round(float(torch.stack(far).mean()), 4), "holds": found["difference"][2] < 0}


def chain_of_experts(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many expert calls, and how many tokens choose another set in the second pass."""
    found = zoo.against_base("chain-of-experts", seed)
    passes = zoo.routings(zoo.model("chain-of-experts", seed))
    other = [
        (a.ids.sort(1).values != b.ids.sort(1).values).any(1).float().mean()
        for a, b in zip(passes[::2], passes[1::2], strict=True)
    ]
    share = float(torch.stack(other).mean())
    return found | {"other_set": round(share, 4), "holds": found["difference"][2] < 0 and share > 0.5}


CLAIMS: Mapping[str, tuple[Callable[[Zoo, int], dict[str, Any]], Sequence[str]]] = {
    "smoe-dropout": (smoe_dropout, (BASE,)),
    "elastic": (elastic, (BASE,)),
    "dynamic-moe": (dynamic_moe, (BASE,)),
    "sigma-moe": (sigma_moe, ("sigma-moe-no-schedule",)),
    "deepseek-moe": (deepseek_moe, (BASE,)),
    "adamoe": (adamoe, (BASE,)),
    "moe-plus-plus": (moe_plus_plus, (BASE,)),
    "rmoe": (rmoe, (BASE,)),
    "rexmoe": (rexmoe, (BASE,)),
    "chain-of-experts": (chain_of_experts, (BASE,)),
    "sinkhorn": (sinkhorn, ("top-k-no-balance",)),
}
"""Architecture -> its claim, and the other runs that it needs."""


def rows(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    zoo = Zoo(args, work)
    for name in args.only or CLAIMS:
        measure, others = CLAIMS[name]
        for seed in args.seeds:
            if any(zoo.folder(each, seed) is None for each in (name, *others)):
                yield {"architecture": name, "seed": seed, "holds": None}
                continue
            yield {"architecture": name, "seed": seed, **measure(zoo, seed)}


def show(row: dict[str, Any]) -> str:
    verdict = {True: "holds", False: "does not hold here", None: "not run"}[row["holds"]]
    facts = {k: v for k, v in row.items() if k not in ("architecture", "seed", "holds")}
    return f"{row['architecture']:18} seed {row['seed']}  {verdict:18}  {json.dumps(facts)}"


def words(kind: Any) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", type=words(str), choices=None)
    parser.add_argument("--seeds", type=words(int), default=[0])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--no-train", dest="train", action="store_false")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = next((name for name in args.only or () if name not in CLAIMS), None)
    if unknown is not None:
        parser.error(f"no claim of '{unknown}': choose from {', '.join(CLAIMS)}")
    torch.set_num_threads(1)
    if args.quick:
        args.tokens, args.only = 2048, args.only or ["smoe-dropout", "rmoe"]
        args.set = [*args.set, "steps=2", "batch=2", "tokens=4096", "model.layers=2", "model.hidden=32"]
    with tempfile.TemporaryDirectory() as scratch:
        found = printed(rows(args, args.work or Path(scratch)), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "zoo", "rows": found}))


if __name__ == "__main__":
    main()

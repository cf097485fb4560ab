"""What it costs to keep the experts of a domain, of others, or of all: mean KL and loss on held-out text of each domain.

    python benchmarks/domain_pruning.py                   # prism-nano-mix, half of the experts, by EASY-EP's score
    python benchmarks/domain_pruning.py --demonstrations python,prose  # and how far 5 demonstrations agree with 25
    python benchmarks/domain_pruning.py --patterns        # PreMoE: its scores beside those, and which domain a prompt is found to be of

Calibration and evaluation text are the two sides of the shipped domains. All points run in mask mode. `alike` divides every domain's
scores by their sum in the layer and averages them, `sum` adds them as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import torch
from printed import printed

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.calibrate.statistics import LayerStatistics, Statistics
from moe_prism.compress.prune import PruneRequest, choose
from moe_prism.compress.prune.change import PruneChange
from moe_prism.data import read_documents, split_documents, token_windows
from moe_prism.elastic import attach
from moe_prism.frontier.measure import measure
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.methods.merge.base import routed_layers
from moe_prism.methods.prune.patterns import Patterns
from moe_prism.methods.prune.select import decide
from moe_prism.model import load_model, load_tokenizer
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.prune import PruneOptions
from moe_prism.options.text import TextSource
from moe_prism.point import FULL, OperatingPoint

DOMAINS = ("python", "prose", "headers", "web")
QUESTION = 240  # characters of a document that are the task


class Bench:
    """The model, the statistics of each domain, and its held-out text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
        self.elastic = attach(self.model, 1)
        self.layers = [layer.parts.layer for layer in self.elastic.layers]
        self.source = TextSource(tuple((name, f"domains/{name}") for name in DOMAINS))
        several = 3 if args.patterns else 1  # draws take a part each
        windows = token_windows(
            self.tokenizer, self.source, "calibration", length=args.length, tokens=several * args.calibration_tokens
        )
        windows = _drawn(windows, args.seed, several)
        work = Pass(self.model, self.layers, Settings(("counts", "outputs", "confidence"), seed=args.seed, domains=DOMAINS))
        work.run(windows.ids, parts=windows.parts)
        for layer in self.elastic.layers:
            layer.parts.layer.install(layer)
        self.found = work.statistics()
        self.held = token_windows(self.tokenizer, self.source, "evaluation", length=args.length, tokens=args.tokens)

    def kept(self, found: Statistics, **options: Any) -> Any:
        """Kept experts of every layer."""
        return decide(self.model, self.layers, found, PruneOptions(keep=self.args.keep, **options)).choices

    def choices(self) -> dict[str, Any]:
        """By name, what is compared."""
        plain = Statistics([LayerStatistics(x.name, x.values) for x in self.found.layers], self.found.profile)
        return {
            **{name: self.kept(self.found, for_domain=[name]) for name in DOMAINS},
            "alike": self.kept(self.found),
            "sum": self.kept(plain),
            "hard-count": self.kept(plain, criterion="hard-count"),
            **{f"random {seed}": self.kept(plain, criterion="random", seed=seed) for seed in range(self.args.draws)},
        }

    def by_patterns(self) -> dict[str, Any]:
        """PreMoE's scores of every domain and of all, how often experts are chosen in a domain, and the mean of all logits."""
        found: dict[str, Any] = {
            f"premoe {name}": self.kept(self.found, criterion="premoe", for_domain=[name]) for name in DOMAINS
        }
        for name in DOMAINS:
            found[f"hard-count {name}"] = self.kept(self.found, criterion="hard-count", for_domain=[name])
            sums = [own.domains[name]["confidence"]["score_sum"] for own in self.found.layers]
            free = [torch.zeros(len(own), dtype=torch.bool) for own in sums]
            found[f"all logits {name}"] = choose(sums, PruneRequest(self.args.keep), self.elastic.k, free, [None] * len(sums))
        return found | {"premoe alike": self.kept(self.found, criterion="premoe")}

    def retrieved(self, tokens: int) -> tuple[float, int, int]:
        """(share of held-out prompts of so many tokens whose domain is named, prompts, bytes of the file)."""
        patterns = Patterns.of(self.found)
        first = routed_layers(self.model, self.layers, [{} for _ in self.layers])[0]
        right = total = at = 0
        for name, windows in self.held.parts:
            for row in self.held.ids[at : at + windows]:
                for prompt in row[: len(row) // tokens * tokens].view(-1, tokens):
                    right += patterns.nearest(patterns.query(self.model, first, prompt[None])) == name
                    total += 1
            at += windows
        return right / total, total, len(patterns.encoded())

    def demonstrations(self, domain: str, count: int, folder: Path) -> list[set[int]]:
        """Experts kept by so many beginnings of calibration documents with the model's own continuations."""
        source = f"domains/{domain}"
        documents = split_documents(read_documents(source), "calibration", source=source)
        tasks = folder / f"{domain}-{count}.jsonl"
        prompts = dict.fromkeys(d.text[at : at + QUESTION] for d in documents for at in (0, len(d.text) // 2))
        chosen = list(itertools.islice(prompts, count))
        tasks.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in chosen))
        options = CalibrateOptions(
            tasks=[str(tasks)],
            answer_tokens=self.args.answer_tokens,
            tokens=1 << 20,
            length=self.args.length,
            collectors=["outputs"],
        )
        found = calibrate_model(self.args.model, folder / f"{domain}-{count}", options)
        return [set(choice.kept) for choice in self.kept(found)]


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per choice: KL and loss above the full model's, of every domain."""
    bench = Bench(args)
    choices = bench.choices() | (bench.by_patterns() if args.patterns else {})
    points = [FULL, *(OperatingPoint(weights=PruneChange(tuple(kept)).part()) for kept in choices.values())]
    full, *found = measure(bench.model, bench.held.ids, points, batch=2, parts=bench.held.parts)
    loss = {name: log(quality.ppl) for name, quality in full.domains.items()}
    for name, one in zip(choices, found, strict=True):
        kl = {d: q.kl for d, q in one.domains.items()}
        yield {"kept by": name, "kl": kl, "loss": {d: log(q.ppl) - loss[d] for d, q in one.domains.items()}}
    if args.patterns:
        for tokens in (16, 64, 128):
            share, prompts, size = bench.retrieved(tokens)
            yield {"retrieved": share, "tokens": tokens, "prompts": prompts, "bytes": size}
    if args.demonstrations:
        with tempfile.TemporaryDirectory() as folder:
            for domain in args.demonstrations.split(","):
                few, many = (bench.demonstrations(domain, count, Path(folder)) for count in (5, 25))
                text = [set(choice.kept) for choice in choices[domain]]
                overlap = {"of 25": _overlap(few, many), "of the text": _overlap(many, text)}
                yield {"demonstrations": domain, "overlap": overlap}


def _drawn(windows: Any, seed: int, several: int) -> Any:
    """Of every domain one part of `several`, by the seed."""
    ids, parts, at = [], [], 0
    for name, count in windows.parts:
        own = windows.ids[at : at + count][seed % several :: several]
        ids.append(own)
        parts.append((name, len(own)))
        at += count
    return replace(windows, ids=torch.cat(ids), parts=tuple(parts))


def _overlap(one: list[set[int]], other: list[set[int]]) -> float:
    return statistics.fmean(len(a & b) / len(a) for a, b in zip(one, other, strict=True))


def show(row: dict[str, Any]) -> str:
    if "overlap" in row:
        few, many = row["overlap"].values()
        return f"demonstrations of {row['demonstrations']}: 5 keep {few:.2f} of what 25 keep, those {many:.2f} of what text keeps"
    if "retrieved" in row:
        return f"{row['retrieved']:.3f} of {row['prompts']} prompts of {row['tokens']} tokens, file of {row['bytes']} bytes"
    cells = "  ".join(f"{d} {row['kl'][d]:.3f} ({row['loss'][d]:+.3f})" for d in DOMAINS)
    return f"{row['kept by']:18} {cells}  worst {max(row['kl'].values()):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-mix")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--draws", type=int, default=3, help="of random")
    parser.add_argument("--tokens", type=int, default=16_384, help="of all domains together")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--demonstrations", default="", help="comma-separated domains to answer tasks of")
    parser.add_argument("--patterns", action="store_true", help="PreMoE's scores and retrieval")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration text, with --patterns")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "domain-pruning", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

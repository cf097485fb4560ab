"""What gate neurons are worth at equal bytes, with compensation, on text that may choose defaults.

    python benchmarks/gates.py [--models nano,nano-mix] [--gates 1,0] [--tokens 4096] [--calibration-tokens 65536] [--json]

Only the calibration sides of the four shipped domains are read. Four of five of their documents calibrate, and the others measure. The
first number of --gates is what the others are compared with. Budgets are bytes, held for every request, so all variants read the same;
`read` says how closely. Gate neurons of all blocks count, and so do predictors and compensation. Brackets: 95 % intervals of the ratio of
mean KLs, by 2,000 samples of windows with replacement, the same for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from domains import RESAMPLES, Run, interval, run_points, threshold
from printed import printed

from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.data.buckets import CALIBRATION
from moe_prism.data.bundled import DOMAINS, domain
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.options.calibrate import CalibrateOptions

MODELS = ["nano", "nano-mix"]
BUDGETS = (0.75, 0.5, 0.25)


def write_documents(folder: Path, name: str) -> Path:
    """The calibration side of a domain as a folder of files, which has two sides of its own."""
    own = folder / name
    own.mkdir()
    for number, document in enumerate(d for d in domain(name) if d.bucket == CALIBRATION):
        (own / f"{number}.txt").write_text(document.text)
    return own


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        texts = {name: str(write_documents(Path(scratch), name)) for name in args.domains}
        for name in args.models:
            source = [f"{domain}={path}" for domain, path in texts.items()]
            statistics = Path(scratch) / f"{name}-calibration"
            calibrate_model(name, statistics, CalibrateOptions(domains=source, tokens=args.calibration_tokens))
            found = {gates: measured(name, gates, statistics, texts, args) for gates in args.gates}
            yield from compared(name, found, args.seed)


def measured(name: str, gates: int, statistics: Path, texts: dict[str, str], args: argparse.Namespace) -> dict[str, list[Run]]:
    """Every budget on every text, of the model with that many gate neurons in each sub-expert."""
    out = statistics.with_name(f"{name}-{gates}")
    refactor(name, out, RefactorOptions(gates=gates), calibration=statistics)
    opened = open_model(out)
    points = [threshold(budget) for budget in BUDGETS]
    found = {}
    for text, path in texts.items():
        windows = token_windows(
            opened.tokenizer, path, "evaluation", length=args.length, tokens=args.tokens, exclude=opened.documents
        )
        found[text] = run_points(opened.model, windows.ids, points)
    return found


def compared(name: str, found: dict[int, dict[str, list[Run]]], seed: int) -> Iterator[dict[str, Any]]:
    base, *others = found
    for text, firsts in found[base].items():
        samples = np.random.default_rng(seed).integers(0, len(firsts[0].kl), (RESAMPLES, len(firsts[0].kl)))
        for gates in others:
            for budget, first, other in zip(BUDGETS, firsts, found[gates][text], strict=True):
                yield {
                    "model": name,
                    "domain": text,
                    "budget": budget,
                    "windows": len(first.kl),
                    "base": base,
                    "gates": gates,
                    "base_kl": float(first.kl.mean()),
                    "kl": float(other.kl.mean()),
                    "base_read": first.share,
                    "read": other.share,
                    "ratio": float(other.kl.mean() / first.kl.mean()),
                    "interval": interval(other.kl[samples].mean(1) / first.kl[samples].mean(1)),
                }


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:9} {row['domain']:8} {row['budget']:4.0%}: r={row['base']} KL {row['base_kl']:.4f} (read {row['base_read']:.1%})  "
        f"r={row['gates']} KL {row['kl']:.4f} (read {row['read']:.1%})  ratio {row['ratio']:.3f} "
        f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}], {row['windows']} windows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: dict[str, Any] = {"type": lambda text: text.split(","), "help": "comma-separated"}
    parser.add_argument("--models", default=MODELS, **names)
    parser.add_argument("--domains", default=list(DOMAINS), **names)
    parser.add_argument("--tokens", type=int, default=4096, help="of each domain")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--gates", default=[1, 0], type=lambda text: [int(g) for g in text.split(",")], help="comma-separated")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "gates", "rows": found}))


if __name__ == "__main__":
    main()

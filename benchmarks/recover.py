"""What recovery wins back: KL to the source with and without repaired W_down, same rule and budget, on held-out text.

    python benchmarks/recover.py [--model nano] [--folder ELASTIC] [--bands 3,1] [--eval-text stdlib,...] [--tokens 8192] [--json]

Baseline, measured in the same run on the same windows: the elastic model as `refactor` wrote it. `params` is what selection and kept
slots read per token, `resident` what the repair adds to the expert weights in memory. Each `recover` runs in a process of its own, for its
time and peak memory; the calibration of prism-nano is the default one (65,536 tokens).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from printed import printed

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.data import token_windows
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.frontier.measure import measure
from moe_prism.jobs.refactor import refactor
from moe_prism.point import FULL

SHARES = (0.75, 0.5, 0.25)
RULES = ("threshold", "product")
RUN = "import sys; from moe_prism.cli import main; sys.exit(main(sys.argv[1:]))"


def recover(folder: Path, out: Path, bands: int, tokens: int) -> dict[str, Any]:
    """Facts of one `moe-prism recover` with its wall-clock seconds."""
    arguments = ["recover", str(folder), "-o", str(out), "--bands", str(bands), "--tokens", str(tokens), "--json"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout), "seconds": round(time.perf_counter() - began, 1)}


def points(folder: Path, text: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """KL and cost of every rule and share on the evaluation side of a text."""
    model, tokenizer = load(folder)
    exclude = read_manifest(folder)["calibration"]["documents"]
    windows = token_windows(tokenizer, text, "evaluation", length=args.length, tokens=args.tokens, exclude=exclude)
    slots = slots_per_token(model._moe_prism)
    plan = [FULL.with_budget(round(share * slots) / slots, rule) for rule in RULES for share in SHARES]
    measured = measure(model, windows.ids, plan, batch=2)
    return [
        {
            "text": text,
            "rule": point.slots.rule,
            "budget": point.slots.budget,
            "kl": found.quality.kl,
            "slots": found.cost.k_slots,
            "params": found.cost.active_expert_params,
        }
        for point, found in zip(plan, measured, strict=True)
    ]


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(args.folder or temporary) / ("" if args.folder else "elastic")
        if not args.folder:
            refactor(args.model, base)
        before = {text: points(base, text, args) for text in args.eval_text.split(",")}
        for bands in (int(b) for b in args.bands.split(",")):
            out = Path(temporary) / f"bands-{bands}"
            facts = recover(base, out, bands, args.calibration_tokens)
            yield {
                "bands": bands,
                **{key: facts[key] for key in ("resident_bytes", "resident_share", "seconds", "peak_rss_bytes")},
            }
            for text, plain in before.items():
                for old, new in zip(plain, points(out, text, args), strict=True):
                    yield {
                        "bands": bands,
                        **new,
                        "kl_before": old["kl"],
                        "params_before": old["params"],
                        "ratio": new["kl"] / old["kl"],
                    }


def show(row: dict[str, Any]) -> str:
    if "seconds" in row:
        return (
            f"bands {row['bands']}: recovered in {row['seconds']} s, peak memory {row['peak_rss_bytes'] / 2**30:.2f} GiB, "
            f"resident +{row['resident_bytes'] / 2**20:.1f} MiB ({row['resident_share']:.0%} of the expert weights)"
        )
    return (
        f"bands {row['bands']} {row['text']:10} {row['rule']:10} {row['budget']:5.0%}: "
        f"KL {row['kl_before']:.4f} -> {row['kl']:.4f} ({row['ratio']:.2f}x), "
        f"{row['slots']:.2f} slots, params {row['params_before']:.0f} -> {row['params']:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--folder", help="an elastic model to start from, instead of refactoring --model")
    parser.add_argument("--bands", default="3,1")
    parser.add_argument("--eval-text", default="stdlib", help="comma-separated")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "recover", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

"""What perplexity hides: slices of held-out text at a few operating points of prism-nano and prism-nano-mix, as tables.

    python benchmarks/judge.py                                     # 16,384 tokens of text that nothing was fitted on
    python benchmarks/judge.py --models nano --tokens 4096 --json

Points: `threshold` at three budgets of the refactored model, plain top-2, `heapr` and whole experts (`prune:easy-ep`) at three quarters,
and the whole model in int8 and int4. An entry is what is kept of the full model's right answers, its standard error, and flips, in percent.
The last column counts slices with less than 90 % (continuation and routing are no abilities and do not count).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from printed import printed

from moe_prism.artefact.open import Opened, open_model
from moe_prism.data import token_windows
from moe_prism.frontier.judge import slices
from moe_prism.frontier.judge.run import Judge
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import subject_of
from moe_prism.jobs.refactor import refactor
from moe_prism.methods.find import method
from moe_prism.methods.quantize.uniform_bits import standing_rows
from moe_prism.methods.skip.base import skip_method
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.point import FULL, OperatingPoint
from moe_prism.report.summary import KEPT

TEXTS = {"nano": "stdlib"}
OTHER_TEXT = "domains"


def points(opened: Opened, text: str, tokens: int) -> dict[str, OperatingPoint]:
    """Name -> point, the full model first."""
    subject = subject_of(opened, FrontierOptions(text=text, calibration_tokens=tokens))
    found = {"full": FULL} | {f"threshold {b}": FULL.with_budget(b, "threshold") for b in (0.75, 0.5, 0.25)}
    found["top-2"] = skip_method("uniform").point(subject, 2).point
    found["heapr .75"] = method("heapr:keep=0.75").points(subject)[0].point
    pruned = {each.name.rpartition("-")[2]: each.point for each in method("prune:easy-ep").points(subject)}
    found["experts .75"] = pruned["0.75"]
    return found | {each.name: each.point for each in standing_rows(subject)}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        text = TEXTS.get(name, OTHER_TEXT)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "elastic"
            calibration = CalibrateOptions(text=text, tokens=args.calibration_tokens)
            refactor(name, folder, RefactorOptions(calibration=calibration))
            opened = open_model(folder)
        ids = token_windows(opened.tokenizer, text, "evaluation", length=512, tokens=args.tokens).ids
        judge = Judge(opened.model, opened.tokenizer, ids, ["all"])
        full = None
        for label, point in points(opened, text, args.calibration_tokens).items():
            quality = measure(opened.model, ids, [point])[0].quality
            full = full or quality.ppl
            scores = judge.ask([point]).points[0]
            yield {
                "model": name, "point": label, "kl": quality.kl, "perplexity": quality.ppl / full - 1,
                "slices": {key: (s.kept, s.stderr, s.flips, s.items, s.full) for key, s in scores.items()},
                "below": [key for key, s in scores.items() if s.is_ability and s.kept < KEPT], "left out": dict(judge.left_out),
            }  # fmt: skip


def show(row: dict[str, Any]) -> str:
    cells = [
        "{:.1f} ± {:.1f} ({:.1f})".format(*(100 * v for v in row["slices"][name][:3])) if name in row["slices"] else "-"
        for name in slices.names()
    ]
    first = [row["model"], row["point"], f"{row['kl']:.4f}", f"{100 * row['perplexity']:+.2f}"]
    return "| " + " | ".join([*first, *cells, ", ".join(row["below"]) or "-"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["nano", "nano-mix"], help="comma-separated")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--calibration-tokens", type=int, default=8_192)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print("| model | point | KL | perplexity, % | " + " | ".join(slices.names()) + " | below 90 % |")
    found = printed(rows(args), show, args.json)
    print(json.dumps(found, indent=1) if args.json else {(r["model"], k): v[3:] for r in found for k, v in r["slices"].items()})


if __name__ == "__main__":
    main()

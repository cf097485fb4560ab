"""Blocks and bits together against either alone, at equal bytes of the routed experts, on text that nothing was fitted on.

    python benchmarks/bits.py [--models nano,nano-mix] [--domains python,prose,headers,web] [--tokens 2048] [--json]

Shares are of the bytes that the model as it is stored (bfloat16) reads per token. Everything counts: scales, predictors, gate neurons
and compensation. Four ways to get there:

- blocks: `threshold`, at the share;
- bits: one width for all experts; of `rtn` with and without zeros in several groups, `nested`, `ternary` and `binary` the one with the
  least KL that reads no more than the share;
- pair: `nested` on all experts and `threshold` on top, the best width, at the share;
- slots: rule `bits`, each slot at its own width.

Cutoffs, predictors and errors come from the calibration sides of the four domains; the measures from their evaluation sides. KL between
measured bytes is on the line of log KL over bytes. Bars: KL of `slots` to the better of `blocks` and `bits` .28 / .22 / .12 / .30 at
33 / 25 / 16 / 11 %, and at least 10 % below that of `pair`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from printed import domain_arguments, printed

from moe_prism.artefact.open import open_model
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.codec.signs import Binary, Ternary
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.elastic.dial import affordable
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import subject_of
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.methods.base import Subject
from moe_prism.methods.find import method
from moe_prism.methods.quantize.uniform_bits import stored_at
from moe_prism.methods.slots.bits import BitsMethod
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, SlotRule

MODELS = ["nano", "nano-mix"]
BARS = {0.33: 0.28, 0.25: 0.22, 0.16: 0.12, 0.11: 0.30}
FORMS = (Rtn(), 64), (Rtn(symmetric=False), 32), (Rtn(symmetric=False), 128), (Nested(), 32)
ALONE = [(codec, bits, group) for codec, group in FORMS for bits in (2, 3, 4, 5)] + [(Ternary(), 1.6, 128), (Binary(), 1, 32)]
PAIRED = (3, 4, 5, 6)
FRACTIONS = (0.35, 0.5, 0.7, 1.0)  # budgets of `threshold` in a pair


class Seen(NamedTuple):
    """One point on one text. share: of the bytes of the full model."""

    name: str
    share: float
    kl: float


def at(share: float, curve: Sequence[Seen]) -> float:
    """KL at a share on the line of log KL through the measured points; nothing is read off beyond them."""
    rows = sorted(curve, key=lambda row: row.share)
    shares, logs = [row.share for row in rows], [np.log(max(row.kl, 1e-9)) for row in rows]
    return float(np.exp(np.interp(share, shares, logs))) if shares[0] <= share <= shares[-1] else float("inf")


def within(share: float, rows: Sequence[Seen]) -> Seen:
    """The closest that reads no more."""
    fits = [row for row in rows if row.share <= share]
    return min(fits, key=lambda row: row.kl) if fits else Seen("-", 0.0, float("inf"))


def points(subject: Subject, settings: str) -> dict[str, list[tuple[str, OperatingPoint]]]:
    """Every point by the way it belongs to."""
    elastic = subject.elastic
    found = {
        "blocks": [
            ("", OperatingPoint(slots=SlotRule(budget=b))) for b in affordable(elastic, (0.05, 0.08, 0.11, 0.16, 0.25, 0.33))
        ]
    }
    found["bits"] = [(f"{codec.name} {bits}, {group}", stored_at(codec, bits, group)) for codec, bits, group in ALONE]
    for bits in PAIRED:
        weights = stored_at(Nested(), bits, 64).weights
        rules = [SlotRule(budget=b, control="none") for b in FRACTIONS]
        found[f"pair {bits}"] = [("", OperatingPoint(weights=weights, slots=rule)) for rule in rules]
    slots = method(settings)
    assert isinstance(slots, BitsMethod)
    fitted = slots.fitted(subject)
    budgets = (0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.34)
    found["slots"] = [("", OperatingPoint(slots=SlotRule(rule="bits", budget=b, bits=fitted))) for b in budgets]
    return found


def compare(subject: Subject, ids: Any, settings: str) -> Iterator[dict[str, Any]]:
    """A row per share."""
    ways = points(subject, settings)
    flat = [point for own in ways.values() for _, point in own]
    full, *rest = measure(subject.model, ids, [FULL, *flat], batch=8)
    measured = iter(rest)
    whole = full.cost.active_expert_bytes
    seen: dict[str, list[Seen]] = {}
    for way, own in ways.items():
        found = [(name, next(measured)) for name, _ in own]
        seen[way] = [Seen(name, m.cost.active_expert_bytes / whole, m.quality.kl) for name, m in found]
    for share, bar in BARS.items():
        blocks, bits = at(share, seen["blocks"]), within(share, seen["bits"])
        pairs = {way: at(share, rows) for way, rows in seen.items() if way.startswith("pair")}
        pair = min(pairs, key=lambda way: pairs[way])
        ours = at(share, seen["slots"])
        yield {
            "share": share,
            "blocks": blocks,
            "bits": bits.kl,
            "bits_name": bits.name,
            "pair": pairs[pair],
            "pair_name": pair,
            "slots": ours,
            "ratio": ours / min(blocks, bits.kl),
            "bar": bar,
            "to_pair": ours / pairs[pair],
        }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.folder / name if args.folder else Path(scratch) / "elastic"
            if not args.folder:
                refactor(name, folder, RefactorOptions(calibration=CalibrateOptions(text=args.text)))
            opened = open_model(folder)
            options = FrontierOptions(text=args.text, calibration_tokens=8192, length=args.length)
            subject = subject_of(opened, options)
            for domain in args.domains:
                source = f"domains/{domain}"
                ids = token_windows(opened.tokenizer, source, "evaluation", length=args.length, tokens=args.tokens).ids
                for row in compare(subject, ids, args.slots):
                    yield {"model": name, "domain": domain, "tokens": int(ids.numel()), **row}


def show(row: dict[str, Any]) -> str:
    met = "met" if row["ratio"] <= row["bar"] else "MISSED"
    met = met if row["ratio"] > 0 else "neither gets there"
    return (
        f"{row['model']:9} {row['domain']:8} {row['share']:4.0%}: blocks {row['blocks']:.4f}  bits {row['bits']:.4f} "
        f"({row['bits_name']})  {row['pair_name']} {row['pair']:.4f}  slots {row['slots']:.4f}  ratio {row['ratio']:.3f} "
        f"(bar {row['bar']:.2f}: {met})  to pair {row['to_pair']:.3f} (bar .90)"
    )


def main() -> None:
    parser = domain_arguments(__doc__, MODELS, DOMAINS, 2048)
    parser.add_argument("--slots", default="bits", help="the method of per-slot widths, with its settings")
    parser.add_argument("--folder", type=Path, help="with refactored models by name, instead of refactoring them")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "bits", "rows": found}))


if __name__ == "__main__":
    main()

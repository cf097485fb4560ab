"""Methods that decide per token what runs, on one chart: KL to the full model at equal bytes, with intervals over windows.

    python benchmarks/routing.py [--model nano] [--folder ELASTIC] [--text stdlib] [--means 3,2.5,2,1.5] [--at 3,2] [--methods A,B]
                                 [--calibration-tokens 8192] [--tokens 8192] [--length 256] [--save FOLDER] [--json]

Every method is fitted to every mean number of experts on the calibration side of --text, and measured on the other side. What it read is
counted, so a method that misses its mean shows it. Its KL at the bytes of `uniform` at a mean of --at is read off its own curve: log KL
over bytes, straight between two points, and beyond the last by the line of the last two. Such a row is marked. `threshold` chooses
sub-experts at the same bytes, its predictor included. Intervals: 95 %, bootstrap over windows; ratios are drawn over the same windows.
--save writes routing-MODEL.json and routing-MODEL.md, a table, again after every method: a run that is ended keeps what it measured, and
another with the same settings adds to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from printed import printed
from torch import Tensor

from moe_prism.artefact.open import Opened, open_model
from moe_prism.data import token_windows
from moe_prism.elastic.rules import rules
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import evaluation_windows, subject_of
from moe_prism.jobs.refactor import refactor
from moe_prism.methods.base import Subject
from moe_prism.methods.skip.base import skip_method
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.point import FULL, OperatingPoint

BASE = "uniform"
METHODS = (
    "sensitivity", "lexi", "ser", "odp", "odp:layers=1", "score-mass", "top-p", "top-p:4", "weight-cutoff", "alloc", "otp",
    "gate-threshold", "threshold", "blocks-and-neurons",
)  # fmt: skip
DRAWS = 1000


@dataclass
class Curve:
    """kl [points, windows], bytes and experts per token of every point, in the order of rising bytes."""

    kl: np.ndarray
    bytes: np.ndarray
    experts: np.ndarray

    def at(self, size: float, pick: np.ndarray) -> float:
        """KL at so many bytes, over the windows that pick [n] names."""
        logs = np.log(np.maximum(self.kl[:, pick].mean(1), 1e-9))
        if len(logs) == 1:
            return float(np.exp(logs[0]))
        place = min(max(int(np.searchsorted(self.bytes, size)), 1), len(logs) - 1)
        low, high = place - 1, place
        part = (size - self.bytes[low]) / max(self.bytes[high] - self.bytes[low], 1e-9)
        return float(np.exp(logs[low] + part * (logs[high] - logs[low])))

    def reaches(self, size: float) -> bool:
        return bool(self.bytes[0] * 0.99 <= size <= self.bytes[-1] * 1.01)


def points(subject: Subject, name: str, means: Sequence[float]) -> list[OperatingPoint]:
    if name in rules.names():
        return [FULL.with_budget(mean / subject.k, name) for mean in means]
    if name == BASE:
        means = range(1, subject.k)
    return [skip_method(name).point(subject, float(mean)).point for mean in means]


def curve(opened: Opened, ids: Tensor, asked: Sequence[OperatingPoint]) -> Curve:
    parts = [(str(i), 1) for i in range(len(ids))]
    found = measure(opened.model, ids, asked, batch=1, parts=parts)
    kl = np.array([[one.domains[name].divergence / one.domains[name].tokens for name, _ in parts] for one in found])
    size = np.array([one.cost.active_expert_bytes for one in found])
    experts = np.array([one.cost.k_slots / opened.n_sub for one in found])
    order = np.argsort(size)
    return Curve(kl[order], size[order], experts[order])


def rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    opened = open_model(folder)
    options = FrontierOptions(text=args.text, tokens=args.tokens, length=args.length)
    ids = evaluation_windows(opened.tokenizer, opened.documents, options).ids
    subject = subject_of(opened, options)
    wanted = args.calibration_tokens
    subject.__dict__["calibration"] = token_windows(
        opened.tokenizer, args.text, "calibration", length=args.length, tokens=wanted
    ).ids
    base = curve(opened, ids, points(subject, BASE, args.means))
    whole = float(base.bytes[-1] / base.experts[-1]) * subject.k
    everything = np.arange(len(ids))
    drawn = np.random.default_rng(0).integers(len(ids), size=(DRAWS, len(ids)))
    for name in (BASE, *args.methods):
        own = base if name == BASE else curve(opened, ids, points(subject, name, args.means))
        yield {
            "method": name,
            "windows": len(ids),
            "points": [[round(float(b) / whole, 4), round(float(k), 5)] for b, k in zip(own.bytes, own.kl.mean(1), strict=True)],
            "experts": [round(float(e), 3) for e in own.experts],
            **{f"at_{mean:g}": _at(own, base, whole * mean / subject.k, everything, drawn) for mean in args.at},
        }


def _at(own: Curve, base: Curve, size: float, everything: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    values = np.array([[own.at(size, pick), base.at(size, pick)] for pick in drawn])
    kl, plain = own.at(size, everything), base.at(size, everything)
    (low, high), (least, most) = (np.quantile(column, [0.025, 0.975]) for column in (values[:, 0], values[:, 0] / values[:, 1]))
    return {
        "kl": [round(float(v), 5) for v in (kl, low, high)],
        "to_uniform": [round(float(v), 3) for v in (kl / plain, least, most)],
        "reached": own.reaches(size),
    }


def show(row: dict[str, Any]) -> str:
    parts = []
    for key, found in row.items():
        if key.startswith("at_"):
            kl, ratio = ("{:.4g} ({:.4g} to {:.4g})".format(*found[name]) for name in ("kl", "to_uniform"))
            parts.append(f"{key[3:]} experts: KL {kl}, {ratio} of uniform{'' if found['reached'] else ', beyond its curve'}")
    return f"{row['method']:16} " + "; ".join(parts) + f"  points {row['points']}"


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: KL at equal bytes as a ratio to uniform's, with its interval; `-` beyond a method's own curve."""
    keys = [key for key in found[0] if key.startswith("at_")]
    lines = [f"| method | {' | '.join(f'{key[3:]} experts' for key in keys)} |", "|---|" + "---|" * len(keys)]
    for row in found:
        cells = []
        for key in keys:
            own = row[key]["kl" if row["method"] == BASE else "to_uniform"]
            value, low, high = (f"{number:.3g}" for number in own)
            cells.append(f"{value} ({low} to {high})" if row[key]["reached"] else "-")
        shown = f"`{row['method']}`" + (": KL" if row["method"] == BASE else "")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def saved(found: Iterable[dict[str, Any]], folder: Path | None, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows; whatever is there so far lies in the folder, with the methods that lay there already, of the same settings."""
    name = f"routing-{Path(settings['model']).name}"
    kept: dict[str, dict[str, Any]] = {}
    if folder is not None and (folder / f"{name}.json").is_file():
        before = json.loads((folder / f"{name}.json").read_text())
        if {key: before[key] for key in settings} == settings:
            kept = {row["method"]: row for row in before["rows"]}
    for row in found:
        kept[row["method"]] = row
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            every = list(kept.values())
            (folder / f"{name}.json").write_text(json.dumps({"benchmark": "routing", **settings, "rows": every}, indent=1) + "\n")
            (folder / f"{name}.md").write_text(table(every))
        yield row


def words(kind: Any) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--folder", type=Path, help="an elastic folder, instead of refactoring --model")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--means", type=words(float), default=[3, 2.5, 2, 1.5])
    parser.add_argument("--at", type=words(float), default=[3, 2])
    parser.add_argument("--methods", type=words(str), default=list(METHODS))
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "elastic"
        if not args.folder:
            refactor(args.model, folder, RefactorOptions(calibration=CalibrateOptions(text=args.text)))
        settings = {name: getattr(args, name) for name in ("model", "text", "tokens", "calibration_tokens", "length")}
        found = printed(saved(rows(args, folder), args.save, settings), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "routing", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

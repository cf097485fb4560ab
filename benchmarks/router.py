"""What training the router of sub-experts wins: NLL and KL at several K, against the untrained router and against `threshold`.

    python benchmarks/router.py [--model nano] [--work FOLDER] [--k 4,8,12,16] [--seeds 3] [--first-seed 0] [--steps 150] [--rate 1e-3]
                                [--losses next-token,kl] [--curricula rising,drawn] [--train-tokens 131072] [--train-length 256]
                                [--tokens 12288] [--length 512] [--quick] [--json]

The elastic model is resliced, and its router trained once for every loss, curriculum and seed, on calibration text. All are measured on the
same held-out windows. KL is to the source model, also at all sub-experts, where a trained router is another model. `bytes` are those of
experts that a token reads, router rows included, to those of the source. `threshold` runs the elastic folder at the budget that reads as
many, its predictor included. Intervals: 95 %, bootstrap over windows; of several seeds the mean, and the least and the largest. --work
keeps the folders, and goes on from what it finds there. --quick trains one seed for three steps: it shows that the command works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import mean_interval
from printed import printed
from torch import Tensor

from moe_prism.artefact.open import Opened, known_documents, open_model
from moe_prism.data import token_windows
from moe_prism.elastic.bind import Step, bind
from moe_prism.frontier.cost import measured_cost
from moe_prism.frontier.measure import Quality, logits_of
from moe_prism.jobs.recover import recover_model
from moe_prism.jobs.refactor import refactor
from moe_prism.jobs.reslice import reslice
from moe_prism.model import find_layers, load_model
from moe_prism.options.recover import RecoverOptions
from moe_prism.point import FULL, OperatingPoint, RoutingStage

TRIES = 10  # halvings of the budget that reads as many bytes


class Found:
    """Quality per window, and bytes per token, of one way to run."""

    def __init__(self, windows: Sequence[Quality], size: float) -> None:
        self.kl = np.array([q.divergence / q.tokens for q in windows])
        self.nll = np.array([q.nll / q.tokens for q in windows])
        self.bytes = size


class Bench:
    """The windows, and what the source says of them."""

    def __init__(self, elastic: Path, args: argparse.Namespace) -> None:
        self.opened = open_model(elastic)
        exclude = known_documents(elastic)
        self.ids = token_windows(
            self.opened.tokenizer, args.eval_text, "evaluation", length=args.length, tokens=args.tokens, exclude=exclude
        ).ids
        elastic_model = self.opened.elastic
        with torch.no_grad(), elastic_model.at(elastic_model.full_step):
            self.source = [logits_of(self.opened.model, row[None]).log_softmax(-1) for row in self.ids]
        self.router = self._router_bytes(self.opened)

    @staticmethod
    def _router_bytes(opened: Opened) -> float:
        layers = opened.elastic.layers
        return sum(x.parts.layer.num_experts * x.parts.layer.hidden for x in layers) * opened.elastic.stored_bytes_per_weight

    @torch.no_grad()
    def measured(self, opened: Opened, point: OperatingPoint, ids: Tensor | None = None) -> Found:
        elastic, windows, costs = opened.elastic, [], []
        step = Step(bind(elastic, [point]))
        for row, source in zip(self.ids if ids is None else ids, self.source, strict=False):
            quality = Quality()
            with elastic.at(step), elastic.count():
                quality.add(source, logits_of(opened.model, row[None]), row[1:])
                costs.append(measured_cost(elastic, step).active_expert_bytes)
            windows.append(quality)
        return Found(windows, sum(costs) / len(costs) + self._router_bytes(opened))

    def threshold(self, size: float) -> Found:
        """`threshold` at the budget that reads so many bytes per token, found on a few windows."""
        low, high, few = 0.02, 1.0, self.ids[:6]
        for _ in range(TRIES):
            middle = (low + high) / 2
            read = self.measured(self.opened, FULL.with_budget(middle, "threshold"), few).bytes
            low, high = (middle, high) if read < size else (low, middle)
        return self.measured(self.opened, FULL.with_budget((low + high) / 2, "threshold"))


def at_k(opened: Opened, k: int, full: int) -> OperatingPoint:
    """The first k of the router's choice."""
    if k == full:
        return FULL
    return OperatingPoint(
        routing=(RoutingStage(layers=(k,) * len(opened.elastic.layers), keep_mass=opened.elastic.normalises()),)
    )


def exactness(elastic: Path, resliced: Path, ids: Tensor) -> float:
    """The largest difference of a logit at all sub-experts, to the largest logit: float32, a few windows."""
    with torch.no_grad():
        one, two = (load_model(folder, torch.float32)(input_ids=ids[:4]).logits for folder in (elastic, resliced))
    return float((one - two).abs().max() / one.abs().max())


def folders(args: argparse.Namespace, work: Path) -> tuple[Path, Path, dict[tuple[str, str], list[Path]]]:
    """(elastic, resliced, trained ones by loss and curriculum), made where they are missing."""
    elastic, resliced = work / f"elastic-{args.model}", work / f"resliced-{args.model}"
    if not elastic.is_dir():
        refactor(args.model, elastic)
    if not resliced.is_dir():
        reslice(elastic, resliced)
    trained: dict[tuple[str, str], list[Path]] = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for curriculum in args.curricula:
            for loss in args.losses:
                out = work / f"trained-{args.model}" / f"{loss}-{curriculum}-{seed}"
                options = RecoverOptions(
                    method="router", loss=loss, curriculum=curriculum, seed=seed, steps=args.steps, rate=args.rate,
                    tokens=args.train_tokens, length=args.train_length,
                )  # fmt: skip
                recover_model(resliced, out, options, resume=True)
                trained.setdefault((loss, curriculum), []).append(out)
    return elastic, resliced, trained


def rows(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    elastic, resliced, trained = folders(args, work)
    bench = Bench(elastic, args)
    plain = open_model(resliced)
    full = plain.elastic.k
    assert full is not None
    trained_names = sum(p.numel() for name, p in plain.model.named_parameters() if name.endswith("gate.weight"))
    share = trained_names / sum(p.numel() for p in plain.model.parameters())
    yield {"exactness": exactness(elastic, resliced, bench.ids), "trained_share": share, "layers": len(find_layers(plain.model))}
    top = bench.measured(bench.opened, FULL).bytes
    untrained = {k: bench.measured(plain, at_k(plain, k, full)) for k in args.k}
    for k, found in untrained.items():
        yield _row("untrained", k, [found], top)
        yield _row("threshold", k, [bench.threshold(found.bytes)], top)
    for (loss, curriculum), outs in trained.items():
        models = [open_model(out) for out in outs]
        for k in args.k:
            yield _row(f"{loss}, {curriculum}", k, [bench.measured(m, at_k(m, k, full)) for m in models], top)


def _row(name: str, k: int, found: Sequence[Found], top: float) -> dict[str, Any]:
    """Of the mean over seeds."""
    row: dict[str, Any] = {"router": name, "k": k, "bytes": round(sum(f.bytes for f in found) / len(found) / top, 4)}
    for measure in ("nll", "kl"):
        values = np.stack([getattr(f, measure) for f in found])
        row[measure] = mean_interval(values.mean(0))
        row[f"{measure}_of_seeds"] = [round(float(v), 4) for v in values.mean(1)]
    return row


def show(row: dict[str, Any]) -> str:
    if "exactness" in row:
        return f"all sub-experts: logits differ by {row['exactness']:.1e} of the largest; {row['trained_share']:.2%} of the weights train"
    kl, nll = ("{:.4f} ({:.4f} to {:.4f})".format(*row[name]) for name in ("kl", "nll"))
    seeds = " ".join(f"{v:.4f}" for v in row["kl_of_seeds"])
    return f"{row['router']:20} K {row['k']:3} bytes {row['bytes']:.3f}  NLL {nll}  KL {kl}  seeds {seeds}"


def words(kind: Any) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--k", type=words(int), default=[4, 8, 12, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--losses", type=words(str), default=["next-token", "kl"])
    parser.add_argument("--curricula", type=words(str), default=["rising", "drawn"])
    parser.add_argument("--train-tokens", type=int, default=131_072)
    parser.add_argument("--train-length", type=int, default=256)
    parser.add_argument("--eval-text", default="stdlib")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.tokens, args.losses, args.curricula = 1, 3, 1024, ["kl"], ["rising"]
        args.train_tokens = 4096
    with tempfile.TemporaryDirectory() as scratch:
        found = printed(rows(args, args.work or Path(scratch)), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "router", "model": args.model, "rows": found}))


if __name__ == "__main__":
    main()

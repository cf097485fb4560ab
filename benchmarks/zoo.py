"""What trained architectures claim, on small models of `moe-prism train`: recipes/zoo, trained where they are missing.

    python benchmarks/zoo.py --work FOLDER [--only smoe-dropout,elastic] [--seeds 0,1] [--set steps=200] [--no-train]
                             [--pictures steps=100] [--tokens 16384] [--quick] [--json]

A model lies in FOLDER/NAME-SEED, and is trained in one thread if it is not there; an interrupted training goes on. Every claim is
measured on held-out programs of the standard library. Each compares with `top-k` of the same seed, sizes and tokens. Intervals: 95 %,
bootstrap over windows of 256 tokens, the same for all. --set changes every recipe; of dit-moe, which learns from pictures, its sizes
alone, and --pictures the rest. --no-train measures what is there. --quick trains
two steps: it shows that the command works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from printed import printed
from zoo_claims import CLAIMS
from zoo_models import Zoo


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
    parser.add_argument("--pictures", action="append", default=[])
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

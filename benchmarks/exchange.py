"""Compressed gradients with controlled feedback (EControl) against naive compression and none, in one small training.

    python benchmarks/exchange.py [--steps 100] [--share 0.01] [--feedback 0.1] [--seeds 0] [--set model.hidden=48] [--quick] [--json]

The same recipe is trained three times: gradients whole; their largest entries with what is left fed back; their largest entries alone. Four
parts of a batch send. Bytes are those that a step sends, of all parts. The loss is on held-out programs of the standard library.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from printed import printed

from moe_prism.jobs.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "zoo" / "top-k.yaml"


def rows(args: argparse.Namespace, work: Path) -> Any:
    for seed in map(int, args.seeds.split(",")):
        for kind in ("whole", "econtrol", "plain"):
            changes = [f"steps={args.steps}", f"seed={seed}", "parts=4", "judge_every=100000", *args.set]
            if kind != "whole":
                changes += [f"exchange.share={args.share}", f"exchange.feedback={args.feedback}", f"exchange.kind={kind}"]
            facts = train(RECIPE, work / f"{kind}-{seed}", changes=changes).to_json()
            sent = {name: facts.get(name) for name in ("sent_bytes", "dense_bytes")}
            yield {"seed": seed, "gradients": kind, "held_out_loss": facts["held_out_loss"], **sent}


def show(row: dict[str, Any]) -> str:
    sent = "" if row["sent_bytes"] is None else f"  {row['sent_bytes']:,} of {row['dense_bytes']:,} bytes a step"
    return f"seed {row['seed']}  {row['gradients']:10} loss {row['held_out_loss']:.4f}{sent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--feedback", type=float, default=0.1)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.steps = 2
        args.set = ["batch=4", "length=32", "tokens=4096", "model.layers=2", "model.hidden=32", *args.set]
    with tempfile.TemporaryDirectory() as scratch:
        found = printed(rows(args, Path(scratch)), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "exchange", "rows": found}))


if __name__ == "__main__":
    main()

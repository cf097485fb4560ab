"""HOBBIT's two pools, one for each precision, against one pool for planes of both. No store has two; nothing here measures time.

    python benchmarks/plane_pools.py [--folder ELASTIC] [--shares .1 .25 .5] [--budgets .24 1] [--policies lfu lru] [--tokens 64] [--json]

Text is decoded over records of planes, and what its steps asked for is replayed: in one pool per layer for all planes, and with the slots
parted between upper and lower planes. The part that misses least on calibration text is judged on held-out text. Figures are records
read per token of the second half of the texts; the first half, and prompts, fill the pools.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offload import PROMPT, Config, decode, elastic, expert_bytes, fitted, held_out, stored

from moe_prism.artefact.load import load
from moe_prism.data import token_windows
from moe_prism.jobs.forecast_planes import filling
from moe_prism.offload.base import KeySpace
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.replay import Group
from moe_prism.store.pools import Eviction
from moe_prism.store.price_planes import AskedPlanes, asked_planes
from moe_prism.store.price_reads import replayed

PARTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the slots, for upper planes
PLANES = 2


def reads(asked: AskedPlanes, space: KeySpace, slots: int, eviction: Eviction) -> float:
    """Records read per counted step."""
    lost = replayed(asked.groups, space, slots, eviction, uncounted=filling(asked.prompts)).lost
    return float(lost.sum()) / len(lost)


def of_plane(groups: Sequence[Group], plane: int) -> list[Group]:
    """What is asked of one plane, keys numbered among its own."""
    found = []
    for group in groups:
        own = [(key // PLANES, weight) for key, weight in zip(group.keys, group.weights, strict=True) if key % PLANES == plane]
        found.append(replace(group, keys=[key for key, _ in own], weights=[weight for _, weight in own]))
    return found


def apart(asked: AskedPlanes, space: KeySpace, slots: int, part: float, eviction: Eviction) -> float:
    """`reads` where upper planes have this part of the slots to themselves, and lower ones the rest."""
    own, upper, total = replace(space, parts=space.parts // PLANES, planes=1), round(part * slots), 0.0
    for plane, each in enumerate((upper, slots - upper)):
        mine = AskedPlanes()
        mine.groups, mine.prompts = of_plane(asked.groups, plane), asked.prompts
        total += reads(mine, own, min(each, len(own)), replace(eviction, group=1))
    return total


def compare(sides: dict[str, AskedPlanes], space: KeySpace, slots: int, policy: str, group: int) -> dict[str, Any]:
    """A row: both on the evaluation side, and the part that calibration text chose."""
    eviction = Eviction(cache_policies.get(policy), group=group)
    able = [part for part in PARTS if min(round(part * slots), slots - round(part * slots)) >= space.layers]
    part = min(able, key=lambda part: apart(sides["calibration"], space, slots, part, eviction))
    held_out = sides["evaluation"]
    one, two = reads(held_out, space, slots, eviction), apart(held_out, space, slots, part, eviction)
    return {"policy": policy, "slots": slots, "one_pool": one, "two_pools": two, "upper_part": part}


def rows(args: Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    whole, tokenizer = load(folder)
    size, length = expert_bytes(folder, whole), PROMPT + args.tokens
    calibration = token_windows(tokenizer, args.text, "calibration", length=length, tokens=length * args.rounds).ids
    texts, found = {"calibration": calibration, "evaluation": held_out(folder, tokenizer, args)}, []
    bits = fitted(folder, args.group, None) if min(args.budgets) < 1 else None
    del whole
    for budget in args.budgets:
        config = Config("planes", budget, options={"policy": "lfu"}, planes=True)
        model, sides = stored(folder, work, size, config, args), {}
        store = model._moe_prism.store
        for side, ids in texts.items():
            with asked_planes(store) as sides[side]:
                for row in ids:
                    decode(model, row[None], config.point(bits), args.tokens)
        for share in args.shares:
            slots = int(share * size) // store.pack.layout.bytes
            each = (compare(sides, store.space, slots, policy, store.group) for policy in args.policies)
            found += [{"budget": budget, "share": share, **row} for row in each]
        store.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="an elastic model, instead of refactoring prism-nano")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.24, 1.0], help="of the rule `bits`; 1: all bits")
    parser.add_argument("--policies", nargs="+", default=["lfu", "lru"])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    args = Namespace(**vars(parser.parse_args()), link=0.0, large=False, low=False)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        found = rows(args, elastic(args, work), work)
    if args.json:
        json.dump({"benchmark": "plane_pools", "arguments": vars(args), "rows": found}, sys.stdout)
        return
    for row in found:
        print("  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()

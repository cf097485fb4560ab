"""ComPEFT against its "works when" line: how much of a fine-tune's gain is left when what it changed is stored in signs.

    python benchmarks/fine_tune.py [--domain prose] [--steps 60] [--tokens 4096] [--seeds 2] [--json]

`nano`'s experts are trained on a domain's calibration side by next-token loss; nothing else is. The differences of all matrices are
stored by the codec `compeft`, or with as many random entries in the place of the largest ones. Gain: NLL on the domain's evaluation side
that the fine-tune saves. Bytes: of the differences, to those in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from printed import printed
from torch import Tensor

from moe_prism.compress.codec.largest_signs import LargestSigns
from moe_prism.compress.quantize.decoded import matrices
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.model import find_layers, load_model, load_tokenizer
from moe_prism.model.named import NANO

LENGTH, BATCH, RATE = 128, 8, 3e-4
KEEPS = (0.05, 0.1, 0.2, 0.5)
SIZES = (0.0, 2.0, 3.0, 4.0, 6.0)
"""Of the kept entries in standard deviations, one of which is chosen on calibration windows that nothing was trained on; 0: their mean."""
CHOOSE = 32  # windows


def nll(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in ids.split(BATCH)) / len(ids)


def tuned(model: Any, weights: list[Tensor], ids: Tensor, steps: int, seed: int) -> list[Tensor]:
    """What training changed of each matrix; the model is as it was afterwards."""
    before = [w.detach().clone() for w in weights]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    owners = [
        w.requires_grad_(True) for w in {id(p): p for layer in find_layers(model) for p in layer.module.parameters()}.values()
    ]
    optimiser = torch.optim.AdamW(owners, lr=RATE, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (BATCH,), generator=g)]
        optimiser.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
    with torch.no_grad():
        changed = [w.detach() - was for w, was in zip(weights, before, strict=True)]
        for w, was in zip(weights, before, strict=True):
            w.copy_(was)
    return changed


def stored(delta: Tensor, keep: float, size: float, seed: int | None = None) -> tuple[Tensor, int]:
    """(the difference as it is read back, bytes); seed: with random entries kept."""
    codec = LargestSigns(keep=keep, size=size)
    if seed is not None:
        chosen = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) < keep
        own = size * delta.std() if size else delta.abs()[chosen].mean()
        return delta.sign() * own * chosen, codec.bytes(delta.shape, 1.6, 32)
    planes = codec.encode(delta, 1.6, 32)
    return codec.decode(planes, 1.6), planes.bytes(1.6)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokenizer, model = load_tokenizer(NANO), load_model(NANO).float().eval()
    with torch.no_grad():
        weights = [w for layer in find_layers(model) for w in matrices(layer)]
    train = token_windows(tokenizer, f"domains/{args.domain}", "calibration", length=LENGTH, tokens=65536).ids
    held_out = token_windows(tokenizer, f"domains/{args.domain}", "evaluation", length=LENGTH, tokens=args.tokens).ids
    train, choosing = train[:-CHOOSE], train[-CHOOSE:]
    plain = nll(model, held_out)

    def with_deltas(deltas: list[Tensor], ids: Tensor) -> float:
        for w, delta in zip(weights, deltas, strict=True):
            w.data.add_(delta)
        found = nll(model, ids)
        for w, delta in zip(weights, deltas, strict=True):
            w.data.sub_(delta)
        return found

    for seed in range(args.seeds):
        changed = tuned(model, weights, train, args.steps, seed)
        whole = plain - with_deltas(changed, held_out)
        yield {"seed": seed, "way": "fine-tune", "keep": 1.0, "size": 0.0, "nll": plain - whole, "share": 1.0, "bytes": 1.0}
        for keep in KEEPS:
            for way in ("largest", "random"):
                own = None if way == "largest" else seed
                every = {size: [stored(delta, keep, size, own) for delta in changed] for size in SIZES}
                best = min(SIZES, key=lambda size: with_deltas([delta for delta, _ in every[size]], choosing))
                for size in sorted({0.0, best}):
                    found = with_deltas([delta for delta, _ in every[size]], held_out)
                    taken = sum(b for _, b in every[size]) / sum(2 * delta.numel() for delta in changed)
                    row = {"seed": seed, "way": way, "keep": keep, "size": size, "nll": found}
                    yield {**row, "share": (plain - found) / whole, "bytes": taken}


def show(row: dict[str, Any]) -> str:
    head = f"seed {row['seed']}  {row['way']:9} {row['keep']:4.0%}  size {row['size']:g}"
    return f"{head}  NLL {row['nll']:.4f}  {row['share']:6.1%} of the gain  {row['bytes']:.3f} of the bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="prose", choices=sorted(DOMAINS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "fine_tune", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()

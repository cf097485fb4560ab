"""Rewiring against its "works when" line: the loss of what follows a prompt, with vectors that were fitted to the prompt and without.

    python benchmarks/rewiring.py [--model nano] [--domains python,prose] [--prompts 24] [--steps 5] [--share 0.25] [--prompt 128] [--json]

A window of a domain's evaluation side is a prompt and as long a continuation. Vectors are fitted to the prompt, then the whole window is
run with them and the continuation's loss is compared, window by window. `shuffled` fits to the same tokens in another order: what it gains
is not due to the prompt's text. Ways: the paper's formula (the least sure layers), `sure` (the others), and `all` layers. Intervals: 95 %,
bootstrap over windows. `prompt` is the loss of the part that was fitted on, before and after; `stayed` the share of the prompts where no
step helped the part that was held out, so that the model is left as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from bootstrap import interval
from printed import printed
from torch import Tensor

from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.methods.skip.rewiring import Rewiring, rewire
from moe_prism.point import FULL, OperatingPoint


@torch.no_grad()
def continuation(opened: Any, window: Tensor, start: int, point: OperatingPoint) -> float:
    """Mean loss of the tokens from `start` on."""
    with opened.elastic.at([point]):
        logits = opened.model(input_ids=window[None]).logits[0, start - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, window[start:]))


def ways(args: argparse.Namespace) -> dict[str, Rewiring]:
    own = {"steps": args.steps, "rate": args.rate}
    return {
        "unsure": Rewiring(share=args.share, **own),
        "sure": Rewiring(share=args.share, sure=True, **own),
        "all": Rewiring(share=1.0, **own),
    }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    opened = open_model(args.model)
    for domain in args.domains:
        ids = token_windows(
            opened.tokenizer, f"domains/{domain}", "evaluation", length=2 * args.prompt, tokens=2 * args.prompt * args.prompts
        ).ids
        plain = np.array([continuation(opened, window, args.prompt, FULL) for window in ids])
        for way, settings in ways(args).items():
            for text in ("prompt", "shuffled") if way == "unsure" else ("prompt",):
                after, before_after = [], []
                for number, window in enumerate(ids):
                    own = window[: args.prompt]
                    if text == "shuffled":
                        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(number))]
                    done = rewire(opened.model, opened.elastic, own[None], settings)
                    point = FULL if done.stage is None else OperatingPoint(routing=(done.stage,))
                    after.append(continuation(opened, window, args.prompt, point))
                    before_after.append((done.before, done.after, done.stage is None))
                gain = plain - np.array(after)
                told = np.array(before_after, float).mean(0)
                row = {"domain": domain, "way": way, "text": text, "windows": len(ids), "nll": float(plain.mean())}
                row |= {
                    "gain": float(gain.mean()),
                    "interval": interval(gain),
                    "prompt": told[:2].tolist(),
                    "stayed": float(told[2]),
                }
                yield row


def show(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    first, last = row["prompt"]
    head = f"{row['domain']:8} {row['way']:7} {row['text']:9} NLL {row['nll']:.4f}  gain {row['gain']:+.5f} ({low:+.5f} to {high:+.5f})"
    return f"{head}  prompt {first:.4f} to {last:.4f}  stayed {row['stayed']:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument(
        "--domains", type=lambda text: text.split(","), default=["python", "prose"], help=f"of {', '.join(DOMAINS)}"
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, and of what follows it")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "rewiring", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()

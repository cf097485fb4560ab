"""The graphs of tokens against its "works when" line, without training: routing entropy, and KL to the model at the same k.

    python benchmarks/graph.py [--model nano] [--stages graph,attention-graph] [--domains python,prose] [--shares 0.1,0.3,0.5]
                               [--tokens 4096] [--length 256] [--json]

Entropy, in nats: of a token's scores over all experts, its own and mixed with those of tokens before, mean over tokens and layers.
`others`: share of a token's experts that the router did not choose. KL to the full model per token, and how much more the next token's loss
is. Intervals: 95 %, bootstrap over windows. All on the evaluation side of each domain; nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from bootstrap import interval
from printed import printed
from torch import Tensor

from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.elastic.observe import viewed
from moe_prism.methods.skip.attention_graph import AttentionGraph
from moe_prism.methods.skip.graph import TokenGraph, mix
from moe_prism.point import FULL, OperatingPoint, RoutingStage


def entropy(scores: Tensor) -> Tensor:
    """[T]: of rows that are made distributions."""
    p = scores / scores.sum(1, keepdim=True)
    return -(p * p.clamp(min=1e-30).log()).sum(1)


def graph(opened: Any, kind: str, share: float) -> OperatingPoint:
    layers, k = len(opened.elastic.layers), opened.elastic.k
    parameters = {"a": ((share,),) * layers}
    stage = RoutingStage(layers=(k,) * layers, stage=kind, parameters=parameters, keep_mass=opened.elastic.normalises())
    return OperatingPoint(routing=(stage,))


@torch.no_grad()
def one_window(opened: Any, window: Tensor, kind: str, share: float) -> dict[str, float]:
    """What the stage does to a window."""
    own, mixed, others = [], [], []
    near = {"graph": TokenGraph, "attention-graph": AttentionGraph}[kind].near

    def look(routed: Any) -> Tensor:
        scores = routed.scores()[:, : routed.experts]
        made = mix(scores, torch.tensor([[share]]), *near(routed, scores))
        own.append(entropy(scores))
        mixed.append(entropy(made))
        index = made.topk(routed.index.shape[1], 1).indices
        others.append((index[:, :, None] != routed.index[:, None]).all(2).float())
        return routed.weight

    with opened.elastic.at([FULL]):
        full = opened.model(input_ids=window[None]).logits[0].float().log_softmax(-1)
    with opened.elastic.at([graph(opened, kind, share)]), viewed(opened.elastic, look):
        found = opened.model(input_ids=window[None]).logits[0].float().log_softmax(-1)
    kl = (full.exp() * (full - found)).sum(-1).mean()
    loss = [torch.nn.functional.nll_loss(rows[:-1], window[1:]) for rows in (full, found)]
    means = {name: float(torch.cat(rows).mean()) for name, rows in (("own", own), ("mixed", mixed), ("others", others))}
    return {**means, "kl": float(kl), "more": float(loss[1] - loss[0])}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    opened = open_model(args.model)
    for domain, kind in product(args.domains, args.stages):
        ids = token_windows(opened.tokenizer, f"domains/{domain}", "evaluation", length=args.length, tokens=args.tokens).ids
        for share in args.shares:
            found = [one_window(opened, window, kind, share) for window in ids]
            values = {name: np.array([own[name] for own in found]) for name in found[0]}
            row: dict[str, Any] = {"stage": kind, "domain": domain, "a": share, "windows": len(ids)}
            row |= {name: float(own.mean()) for name, own in values.items()}
            yield {**row, "kl_interval": interval(values["kl"]), "more_interval": interval(values["more"])}


def show(row: dict[str, Any]) -> str:
    low, high = row["kl_interval"]
    least, most = row["more_interval"]
    head = f"{row['stage']:15} {row['domain']:8} a {row['a']:g}  entropy {row['own']:.3f} to {row['mixed']:.3f}  others {row['others']:.1%}"
    return f"{head}  KL {row['kl']:.4f} ({low:.4f} to {high:.4f})  loss {row['more']:+.4f} ({least:+.4f} to {most:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument(
        "--domains", type=lambda text: text.split(","), default=["python", "prose"], help=f"of {', '.join(DOMAINS)}"
    )
    parser.add_argument("--stages", type=lambda text: text.split(","), default=["graph", "attention-graph"])
    parser.add_argument("--shares", type=lambda text: [float(part) for part in text.split(",")], default=[0.1, 0.3, 0.5])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "graph", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()

"""Whether the entropy of routers finds the prompts that gain from retrieved text: against retrieval at random, at equal retrievals.

    python benchmarks/expert_rag.py [--model nano] [--text stdlib] [--prompts 256] [--chunk 64] [--rates 0.25,0.5,0.75] [--json]

Held-out documents are cut into chunks. A prompt is a chunk, what follows it is the next. Retrieved is the best chunk by BM25 (the package
rank-bm25) of all chunks but these two. The gain of a prompt is how much less the mean loss of what follows is with the retrieved chunk in
front. `gate` retrieves for the share --rates of prompts with the largest router entropy (`expert-rag`), `random` for as many at random:
its expected gain is the rate times the mean. `loss` chooses by the loss of the prompt itself, `best` knows the gains. Intervals: 95 %,
bootstrap over prompts, of gate less random among them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from bootstrap import DRAWS
from numpy.typing import NDArray
from printed import printed
from rank_bm25 import BM25Okapi
from torch import Tensor

from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.methods.decode.expert_rag import router_entropy

Values = NDArray[np.float64]


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """[length - 1] of ids [length]."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def measured(opened: Any, args: argparse.Namespace) -> dict[str, Values]:
    """[prompts] each: entropy, loss of the prompt, gain of what follows."""
    size = args.chunk
    pairs = token_windows(opened.tokenizer, args.text, "evaluation", length=2 * size, tokens=2 * size * args.prompts).ids
    chunks = pairs.reshape(-1, size)
    index = BM25Okapi([row.tolist() for row in chunks])
    found: dict[str, list[float]] = {"entropy": [], "loss": [], "gain": []}
    for i, pair in enumerate(pairs):
        scores = index.get_scores(pair[:size].tolist())
        scores[[2 * i, 2 * i + 1]] = -np.inf
        with router_entropy(opened.elastic) as seen, torch.no_grad():
            opened.model(input_ids=pair[None, :size], use_cache=False)
        plain = losses(opened.model, pair)
        longer = losses(opened.model, torch.cat([chunks[int(scores.argmax())], pair]))
        found["entropy"].append(float(np.mean(seen)))
        found["loss"].append(float(plain[: size - 1].mean()))
        found["gain"].append(float(plain[-size:].mean() - longer[-size:].mean()))
    return {name: np.array(values) for name, values in found.items()}


def chosen(by: Values, gain: Values, rate: float) -> float:
    """Mean gain over all prompts where the share with the largest `by` retrieves."""
    count = round(rate * len(gain))
    return float(gain[np.argsort(-by, kind="stable")[:count]].sum() / len(gain))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    opened = open_model(args.model)
    found = measured(opened, args)
    gain = found["gain"]
    picks = np.random.default_rng(0).integers(len(gain), size=(DRAWS, len(gain)))
    ranks = [np.argsort(np.argsort(found[name])) for name in ("entropy", "gain")]
    head = {"prompts": len(gain), "mean_gain": float(gain.mean()), "rank_correlation": float(np.corrcoef(*ranks)[0, 1])}
    for rate in args.rates:
        row: dict[str, Any] = {**head, "rate": rate, "random": rate * float(gain.mean()), "best": chosen(gain, gain, rate)}
        for name in ("entropy", "loss"):
            more = [chosen(found[name][p], gain[p], rate) - rate * gain[p].mean() for p in picks]
            own = chosen(found[name], gain, rate)
            row["gate" if name == "entropy" else name] = [
                own,
                own - row["random"],
                *map(float, np.quantile(more, (0.025, 0.975))),
            ]
        yield row


def show(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {row[name][0]:+.4f}, {row[name][1]:+.4f} ({row[name][2]:+.4f} to {row[name][3]:+.4f}) to random"
        for name in ("gate", "loss")
    ]
    return (
        f"rate {row['rate']:g}: random {row['random']:+.4f}  {'  '.join(parts)}  best {row['best']:+.4f}  "
        f"[{row['prompts']} prompts, mean gain {row['mean_gain']:+.4f}, rank correlation {row['rank_correlation']:+.3f}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[0.25, 0.5, 0.75])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "expert_rag", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()

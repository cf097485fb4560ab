"""Self-draft: how often a draft of the model itself is right, what it reads, and what it would gain in time.

    python benchmarks/self_draft.py FOLDER [--budgets 0.35,0.5,0.75] [--lengths 1,2,4] [--prompts 16] [--temperature 0]
    python benchmarks/self_draft.py --time [--layers 2] [--batches 1,4] [--kept 0.8] [--rounds 7]

The first continues held-out Python with the model in FOLDER. `kept` is the share of drafted tokens that were right, of those whose
predecessors were, with the 95 % interval over prompts (bootstrap). `forwards` and `bytes` are per token of the answer, bytes as a share of
plain decoding: every block once per pass, whatever the number of its tokens that want it. The prompt's pass is left out.

The second times a model of OLMoE's shape with random weights, whose experts dominate: a plain step, a step of the draft (a quarter of the
experts) and checks of n + 1 tokens, all in turns. `speed` is tokens per second as a share of plain decoding, with the share of drafted
tokens kept that `--kept` gives, and `free` the same if guesses took no time: no draft can be faster. Random weights route evenly: no two
tokens are more alike in their experts than chance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch


def interval(pairs: list[tuple[int, int]], draws: int = 1000) -> tuple[float, float]:
    """95 % of the ratio of sums over resampled pairs."""
    rows, generator = torch.tensor(pairs, dtype=torch.float64), torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(rows), (draws, len(rows)), generator=generator)
    sums = rows[picks].sum(1)
    low, high = (sums[:, 0] / sums[:, 1].clamp(min=1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def acceptance(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every budget and length."""
    from moe_prism import load
    from moe_prism.data import token_windows
    from moe_prism.methods.decode.run import Through, decoder_of
    from moe_prism.point import FULL, Decoding, OperatingPoint

    model, tokenizer = load(args.folder)
    elastic = model._moe_prism
    prompts = token_windows(tokenizer, "stdlib", "evaluation", length=64, tokens=64 * args.prompts).ids
    warm = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature > 0 else {"do_sample": False}

    def run(new: int = args.new, **settings: Any) -> tuple[list[Any], list[dict[str, Any]], list[list[int]]]:
        point = OperatingPoint(decoding=Decoding(method="self-draft", settings={"adapt": False, **settings}))
        spent, facts, made = [], [], []
        for i, row in enumerate(prompts):
            through = Through(decoder_of(elastic, point), tokenizer, elastic, FULL, counting=True)
            torch.manual_seed(i)
            ids = model.generate(
                row[None], max_new_tokens=new, custom_generate=through, eos_token_id=None, pad_token_id=0, **warm
            )
            spent.append(through.spent)
            facts.append(through.facts)
            made.append(ids[0].tolist())
        return spent, facts, made

    plain, _, answers = run(length=0)
    prompt = sum(s.expert_bytes for s in run(new=1, length=0)[0])
    read, rows = sum(s.expert_bytes for s in plain) - prompt, []
    for budget in args.budgets:
        for length in args.lengths:
            spent, facts, made = run(budget=budget, length=length)
            assert made == answers  # token for token
            tried = [(f["kept"], f["tried"]) for f in facts]
            rows.append(
                {
                    "budget": budget,
                    "length": length,
                    "kept": sum(k for k, _ in tried) / sum(t for _, t in tried),
                    "interval": interval(tried),
                    "forwards": sum(s.forwards - 1 for s in spent) / ((args.new - 1) * len(prompts)),
                    "bytes": (sum(s.expert_bytes for s in spent) - prompt) / read,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def times(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every batch and length."""
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from transformers.cache_utils import DynamicCache

    from moe_prism.elastic.bind import Step, bind
    from moe_prism.elastic.runtime import attach
    from moe_prism.methods.decode.base import at_budget
    from moe_prism.point import FULL

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = OlmoeConfig(num_hidden_layers=args.layers, vocab_size=4096)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    for p in model.parameters():  # a draw per weight would take minutes: rows of one draw, shifted
        draw = torch.randn(min(p.numel(), 1_000_003)) * 0.02
        flat = p.data.view(-1)
        for start in range(0, len(flat), len(draw)):
            flat[start : start + len(draw)] = draw[: len(flat) - start]
        if p.ndim == 1:
            p.data.fill_(1.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    elastic = attach(model, 1)
    full, cheap = (Step(bind(elastic, [point])) for point in (FULL, at_budget(elastic, FULL, 0.25)))
    longest, rows = max(args.lengths), []
    for batch in args.batches:
        seconds: dict[str, list[float]] = {}
        for turn in range(args.rounds + 1):
            ids = torch.randint(0, 4096, (batch, 32 + longest + 1))
            cache = DynamicCache()
            with torch.no_grad(), elastic.at(full):
                model(input_ids=ids[:, :32], past_key_values=cache, use_cache=True)
            kinds = [("plain", full, 1), ("draft", cheap, 1), *((f"check {n}", full, n + 1) for n in args.lengths)]
            for name, step, count in kinds:
                with torch.no_grad(), elastic.at(step):
                    began = time.perf_counter()
                    model(input_ids=ids[:, 32 : 32 + count], past_key_values=cache, use_cache=True)
                    took = time.perf_counter() - began
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, :32], layer.values[:, :, :32]
                if turn:
                    seconds.setdefault(name, []).append(took)
        for n in args.lengths:
            tokens = (1 - args.kept ** (n + 1)) / (1 - args.kept)
            each = list(zip(seconds["plain"], seconds["draft"], seconds[f"check {n}"], strict=True))
            speeds = sorted(tokens * p / (n * d + c) for p, d, c in each)
            rows.append(
                {
                    "batch": batch,
                    "length": n,
                    "draft": statistics.median(d / p for p, d, _ in each),
                    "check": statistics.median(c / p for p, _, c in each),
                    "tokens": tokens,
                    "speed": statistics.median(speeds),
                    "range": (speeds[0], speeds[-1]),
                    "free": statistics.median(tokens * p / c for p, _, c in each),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--budgets", type=lambda t: [float(b) for b in t.split(",")], default=[0.35, 0.5, 0.75])
    parser.add_argument("--lengths", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2, 4])
    parser.add_argument("--batches", type=lambda t: [int(n) for n in t.split(",")], default=[1, 4])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kept", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not args.time and args.folder is None:
        parser.error("give a FOLDER that `moe-prism refactor` wrote, or --time")
    (times if args.time else acceptance)(args)


if __name__ == "__main__":
    main()

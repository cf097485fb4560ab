"""D2MoE's choice of a width per token and expert, on text that nothing was fitted on.

    python benchmarks/bit_router.py [--models nano,nano-mix] [--domains python,prose,headers,web] [--tokens 512] [--json]

Widths 2, 3 and 4 of one nested file, groups of 64, at three budgets. What a slot's error is predicted by:

- fitted: the input, the expert and the routing weight;
- no input: the expert and the routing weight; weight alone: the routing weight;
- random: nothing (a row of noise, three draws).

Against 2, 3 and 4 bits for all, from the same planes. KL to the source in nats per token; bytes that a token reads of experts and the bit
router, as a share of the source's. R2: how much of the variance of an expert's log error on held-out inputs its row explains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from printed import domain_arguments, printed

from moe_prism.artefact.open import open_model
from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.codec.nested import Nested
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.elastic.rules.d2moe import read_rows, written_rows
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.base import Subject
from moe_prism.methods.find import method
from moe_prism.methods.quantize.uniform_bits import stored_at
from moe_prism.methods.slots.d2moe import predicted_levels, sampled_rows, slot_errors
from moe_prism.methods.statistics import statistics_of
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, SlotBits

MODELS = ["nano", "nano-mix"]
GROUP, DRAWS = 64, 3


def other_router(subject: Subject, bits: SlotBits, what: str, seed: int = 0) -> SlotBits:
    """The same with rows that know less."""
    g = torch.Generator().manual_seed(seed)
    texts, levels = [], []
    for layer, text, own in zip(
        subject.elastic.layers, bits.router.rows, statistics_of(subject, ("counts", "tokens")).layers, strict=True
    ):
        moe = layer.parts.layer
        rows, inputs = read_rows(text, moe), sampled_rows(own, moe.num_experts)
        mean = torch.stack([x.mean(0) for x, _ in inputs])
        offsets = (rows[:, :-1] * mean).sum(1) + rows[:, -1]
        if what == "random":
            rows = torch.cat([torch.randn(rows.shape[0], rows.shape[1] - 1, generator=g) * 20, torch.zeros(len(rows), 1)], 1)
        else:
            rows = torch.cat([torch.zeros(rows.shape[0], rows.shape[1] - 1), offsets[:, None]], 1)
            if what == "weight alone":
                rows[:, -1] = offsets.mean()
        texts.append(written_rows(rows))
        levels.append(predicted_levels(read_rows(texts[-1], moe), inputs, own.values["counts"]["count"]))
    return replace(bits, router=replace(bits.router, rows=tuple(texts), levels=tuple(levels)))


@torch.no_grad()
def explained(subject: Subject, bits: SlotBits, ids: torch.Tensor) -> float:
    """R2 on held-out inputs, mean of the layers."""
    layers = [layer.parts.layer for layer in subject.elastic.layers]
    work = Pass(subject.model, layers, Settings(collectors=("counts", "tokens"), capacity=128))
    work.run(ids)
    for layer in subject.elastic.layers:
        layer.parts.layer.install(layer)
    found = []
    for layer, text, own in zip(subject.elastic.layers, bits.router.rows, work.statistics().layers, strict=True):
        moe, low = layer.parts.layer, layer.coded(bits).at(bits.widths[0]).layer
        rows, left, all_ = read_rows(text, moe), 0.0, []
        for e in range(moe.num_experts):
            x, _ = own.inputs(e)
            if len(x):
                y = slot_errors(moe, [low], e, x)[:, 0].clamp(min=1e-20).log()
                left += float((y - (x @ rows[e, :-1] + rows[e, -1])).square().sum())
                all_.append(y)
        every = torch.cat(all_)
        found.append(1 - left / float((every - every.mean()).square().sum()))
    return sum(found) / len(found)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        opened = open_model(name)
        subject = subject_of(opened, FrontierOptions(text=args.text, calibration_tokens=8192, length=args.length))
        texts = [f"domains/{domain}" for domain in args.domains]
        windows = [token_windows(opened.tokenizer, t, "evaluation", length=args.length, tokens=args.tokens).ids for t in texts]
        ids = torch.cat(windows)
        own = [named.point for named in method(f"d2moe:widths=2-3-4:group={GROUP}").points(subject)]
        bits = own[0].slots.bits
        ways = {"fitted": [bits], **{what: [other_router(subject, bits, what)] for what in ("no input", "weight alone")}}
        ways["random"] = [other_router(subject, bits, "random", seed) for seed in range(DRAWS)]
        points = {
            (what, point.slots.budget): [OperatingPoint(slots=replace(point.slots, bits=each)) for each in routers]
            for what, routers in ways.items()
            for point in own
        }
        points |= {(f"{w} bits for all", 0.0): [stored_at(Nested(base=2), w, GROUP)] for w in (2, 3, 4)}
        flat = [point for each in points.values() for point in each]
        full, *rest = measure(opened.model, ids, [FULL, *flat], batch=8)
        measured = iter(rest)
        for (what, budget), each in points.items():
            found = [next(measured) for _ in each]
            kl = sum(m.quality.kl for m in found) / len(found)
            read = sum(m.cost.active_expert_bytes for m in found) / len(found) / full.cost.active_expert_bytes
            yield {"model": name, "way": what, "budget": budget, "kl": kl, "bytes": read}
        yield {"model": name, "way": "R2", "budget": 0.0, "kl": explained(subject, bits, ids), "bytes": float("nan")}


def show(row: dict[str, Any]) -> str:
    return f"{row['model']:>9}  {row['way']:<16} budget {row['budget']:.3f}  KL {row['kl']:.4f}  bytes {row['bytes']:.4f}"


def main() -> None:
    args = domain_arguments(__doc__, MODELS, list(DOMAINS), 512).parse_args()
    found = printed(rows(args), show, quiet=args.json)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

"""What a price on the first slot of a device saves on the wire: rule `first-slot` against `threshold` that keeps as many slots.

    python benchmarks/traffic.py [--folder ELASTIC] [--devices 0] [--tolls 4,6,8] [--budget 0.5] [--tokens 8192] [--text stdlib] [--json]
    python benchmarks/traffic.py --simulate [--tolls 2,4,8,16]      # DeepSeek-V3's numbers, drawn values, no model

For every toll the budget is found on calibration text, at which the rule keeps as many slots as `threshold` does at `--budget`. What is
printed is of evaluation text: KL to the full model, slots and sends per token and layer, sends as a share of the full model's, KL as a
share of `threshold`'s with its 95 % interval, by bootstrap over windows. devices: that the experts are dealt out to; 0: one each.

The simulation has 256 experts in 8 groups on 32 devices, 8 experts of 4 groups per token, 8 sub-experts each. Routing weights are
normalised sigmoids of normal logits, norms log-normal. It prints sends, and the squared values that are dropped, both to `threshold`'s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from printed import printed
from torch import Tensor

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.data import token_windows
from moe_prism.elastic import Slots
from moe_prism.elastic.counter import Counter
from moe_prism.elastic.rules import rules
from moe_prism.elastic.rules.threshold import fit_cutoffs
from moe_prism.frontier.measure import Measurement, measure
from moe_prism.jobs.refactor import refactor
from moe_prism.point import FULL, OperatingPoint, SlotRule, Toll

GRID = (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
DRAWS, LENGTH = 1000, 512
EXPERTS, GROUPS, KEPT_GROUPS, CHOSEN, BLOCKS, DEVICES = 256, 8, 4, 8, 8, 32  # of DeepSeek-V3, and blocks of ours


def point(budget: float, toll: Toll | None) -> OperatingPoint:
    rule = "threshold" if toll is None else "first-slot"
    return OperatingPoint(slots=SlotRule(rule=rule, budget=budget, of="slots", control="none", toll=toll))


def equal_budget(slots: Sequence[float], grid: Sequence[float], wanted: float) -> float:
    """Where a rule keeps so many slots, between what was counted at the budgets of the grid."""
    return float(np.interp(wanted, slots, grid))


def ratio(ours: Measurement, theirs: Measurement) -> list[float]:
    """[KL as a share of another's, low, high], 95 % by bootstrap over windows."""
    kl = np.array([[q.divergence for q in found.domains.values()] for found in (ours, theirs)])
    drawn = np.random.default_rng(0).integers(kl.shape[1], size=(DRAWS, kl.shape[1]))
    spread = kl[0][drawn].sum(1) / kl[1][drawn].sum(1)
    return [round(float(v), 3) for v in (kl[0].sum() / kl[1].sum(), *np.quantile(spread, (0.025, 0.975)))]


def rows(folder: Path, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model, tokenizer = load(folder)
    known = read_manifest(folder)["calibration"]["documents"]
    fitted = token_windows(tokenizer, asked.text, "calibration", length=LENGTH, tokens=4096).ids
    held = token_windows(tokenizer, asked.text, "evaluation", length=LENGTH, tokens=asked.tokens, exclude=known).ids
    windows = [(str(i), 1) for i in range(len(held))]
    wanted = measure(model, fitted, [point(asked.budget, None)])[0].cost.k_slots
    chosen: list[tuple[str, OperatingPoint]] = [("full", FULL), ("threshold", point(asked.budget, None))]
    for price in asked.tolls:
        toll = Toll(price=price, devices=asked.devices)
        found = [m.cost.k_slots for m in measure(model, fitted, [point(b, toll) for b in GRID])]
        chosen.append((f"toll {price:g}", point(equal_budget(found, GRID, wanted), toll)))
    found = measure(model, held, [p for _, p in chosen], parts=windows, devices=asked.devices)
    full, plain = found[:2]
    for (name, own), m in zip(chosen, found, strict=True):
        yield {
            "what": name,
            "budget": round(own.slots.budget, 4),
            "kl": round(m.quality.kl, 5),
            "slots": round(m.cost.k_slots, 3),
            "sends": round(m.cost.sends, 3),
            "sends_to_full": round(m.cost.sends / full.cost.sends, 3),
            "kl_to_threshold": ratio(m, plain) if m is not full else None,
        }


def drawn(tokens: int) -> Slots:
    """Of a layer with DeepSeek-V3's numbers."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, EXPERTS, generator=g).sigmoid()
    grouped = scores.view(tokens, GROUPS, -1)
    best = grouped.topk(2, 2).values.sum(2).topk(KEPT_GROUPS, 1).indices
    inside = torch.zeros(tokens, GROUPS, dtype=torch.bool).scatter_(1, best, True)
    weight, index = grouped.masked_fill(~inside[:, :, None], 0).flatten(1).topk(CHOSEN, 1)
    norms = (0.5 * torch.randn(tokens, CHOSEN, 1, generator=g) + 0.7 * torch.randn(tokens, CHOSEN, BLOCKS, generator=g)).exp()
    valid = torch.ones(tokens, CHOSEN, dtype=torch.bool)
    return Slots(torch.zeros(tokens, 1), index, weight / weight.sum(1, keepdim=True), valid, BLOCKS, lambda: norms)


def simulated(asked: argparse.Namespace, tokens: int = 4096) -> Iterator[dict[str, Any]]:
    slots = drawn(tokens)
    values = slots.values()
    cutoffs = fit_cutoffs(values.flatten(), torch.ones(values.numel()))
    layer = SimpleNamespace(num_experts=EXPERTS, up=torch.empty(0))
    parts: Any = SimpleNamespace(layer=layer, tensors={"cutoffs": cutoffs})

    def kept(rule: Callable[[], Any], budget: float) -> Tensor:
        found: Tensor = rule().keep(slots, torch.full((tokens,), budget))
        return found

    plain = kept(lambda: rules.get("threshold")(parts), asked.budget)
    for devices in (EXPERTS, DEVICES, GROUPS):
        before = _counted(slots, plain, devices)
        full = _counted(slots, torch.ones_like(plain), devices)
        yield {"devices": devices, "what": "threshold", "sends_to_full": round(before[0] / full[0], 3), "dropped": 1.0}
        for price in asked.tolls:
            made: Any = rules.get("first-slot")
            rule = made(parts, Toll(price=price, devices=devices))
            shares = [float(kept(lambda rule=rule: rule, b).double().mean()) for b in GRID]
            own = kept(lambda rule=rule: rule, equal_budget(shares, GRID, float(plain.double().mean())))
            sends, lost = _counted(slots, own, devices)
            yield {
                "devices": devices,
                "what": f"toll {price:g}",
                "slots": round(float(own.double().mean()) * CHOSEN * BLOCKS, 2),
                "sends_to_full": round(sends / full[0], 3),
                "dropped": round(lost / before[1], 3),
            }


def _counted(slots: Slots, keep: Tensor, devices: int) -> tuple[float, float]:
    """(sends, squared values that are dropped), per token."""
    counter = Counter(EXPERTS, BLOCKS, devices=devices)
    counter.add(slots.index, keep)
    return counter.sends / counter.tokens, float(slots.values().square()[~keep].sum()) / counter.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--tolls", type=lambda text: [float(part) for part in text.split(",")], default=[4.0, 6.0, 8.0])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = asked.folder or Path(work) / "elastic"
        if not asked.simulate and asked.folder is None:
            refactor("nano", folder)
        found = printed(simulated(asked) if asked.simulate else rows(folder, asked), _line, asked.json)
    if asked.json:
        print(json.dumps(found))


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in row.items())


if __name__ == "__main__":
    main()

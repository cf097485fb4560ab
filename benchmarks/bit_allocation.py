"""Bits per expert (PMQ, QuantMoE-Bench) and per neuron (CAMERA-Q) against their "works when" lines, on text that nothing was fitted on.

    python benchmarks/bit_allocation.py [--models nano,nano-mix] [--domains python,prose,headers,web] [--tokens 1024]
        [--camera] [--edge] [--json]

KL to the source, all experts rounded to nearest in groups of 32. Statistics come from the calibration sides of the four domains.

- 2.5 bits: PMQ, with one choice for the whole model, and with experts that may be dropped. Against the same widths at random experts of
  their layer (five draws), widths by frequency alone (every expert's error taken for its layer's mean), and 2 bits for all.
- 3 bits: the rules, of 4 bits and 2. Against their own ranking reversed, a random one (five draws), and 3 bits for all.
- CAMERA-Q at 2 and 2.5 bits, and at 3 of 2, 3 and 4. Against one width for all, and against each matrix of a layer banded by itself, by the
  norms of its own rows (of down: columns), with as many neurons at each width.
- EdgeMoE: the fewest bits of 2, 3, 4 and 8 within a bound of KL on calibration text, measured there. Against as many bits by the error of
  each layer's output, and the same widths at random experts (three draws).

bytes: that a token reads of experts, as a share of the source's. Frequent experts in more bits are read more often.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from printed import domain_arguments, printed

from moe_prism.artefact.open import open_model
from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.allocate import cheapest
from moe_prism.compress.quantize.bands import BandChange, bands
from moe_prism.compress.quantize.decoded import matrices, replaced
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.base import Subject
from moe_prism.methods.find import method
from moe_prism.methods.quantize.averaged import one_choice, written_widths
from moe_prism.methods.quantize.edge_moe import BOUNDS, EdgeMoeParameters
from moe_prism.methods.quantize.pmq import WEIGHED, WIDTHS, costs_of
from moe_prism.methods.quantize.quantmoe import BY_LAYER, RULES, two_widths
from moe_prism.methods.quantize.uniform_bits import stored_at
from moe_prism.methods.statistics import statistics_of
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint

MODELS = ["nano", "nano-mix"]
DRAWS, GROUP = 5, 32


def pmq_points(subject: Subject) -> dict[str, list[OperatingPoint]]:
    """At 2.5 bits, by what is compared; several are draws of one thing."""
    names = {
        "pmq": "pmq:2.5",
        "pmq, the paper's weights": "pmq:bits=2.5:by=paper",
        "pmq, one choice": "pmq:bits=2.5:scope=model",
        "pmq, one choice, may drop": "pmq:bits=2.5:scope=model:drop=true",
    }
    found = {title: [method(name).points(subject)[0].point] for title, name in names.items()}
    own = found["pmq"][0].weights.settings["bits"]
    draws = [QuantizeChange(Rtn(), shuffled(own, seed), GROUP) for seed in range(DRAWS)]
    found["pmq's widths at random"] = [OperatingPoint(weights=change.part()) for change in draws]
    rows = []
    for costs, layer in zip(
        costs_of(subject, Rtn(), GROUP, WIDTHS, WEIGHED["error"]),
        statistics_of(subject, ("counts", "tokens")).layers,
        strict=True,
    ):
        share = layer.values["counts"]["count"].double() / layer.values["counts"]["count"].sum()
        rows.append(tuple(map(float, cheapest(share[:, None] * costs.mean(0), WIDTHS, round(2.5 * len(costs))))))
    found["by frequency alone"] = [OperatingPoint(weights=QuantizeChange(Rtn(), tuple(rows), GROUP).part())]
    found["2 bits"], found["3 bits"] = ([stored_at(Rtn(), bits, GROUP)] for bits in (2, 3))
    return found


def rule_points(subject: Subject) -> dict[str, list[OperatingPoint]]:
    """At 3 bits."""
    found = {}
    for name, rule in RULES.items():
        scores = rule(subject)
        found[name] = [two_widths(scores, 3.0, GROUP, name in BY_LAYER)]
        found[f"{name}, reversed"] = [two_widths([-s for s in scores], 3.0, GROUP, name in BY_LAYER)]
    sizes = [layer.parts.layer.num_experts for layer in subject.elastic.layers]
    generators = [torch.Generator().manual_seed(seed) for seed in range(DRAWS)]
    found["a random ranking"] = [two_widths([torch.rand(n, generator=g) for n in sizes], 3.0, GROUP, True) for g in generators]
    return found


def edge_points(subject: Subject) -> dict[str, list[OperatingPoint]]:
    """For every bound."""
    widths = written_widths(EdgeMoeParameters.widths, GROUP)
    costs = costs_of(subject, Rtn(), GROUP, widths, WEIGHED["error"])
    found = {}
    for bound in BOUNDS:
        point = method(f"edge-moe:{bound}").points(subject)[0].point
        rows = point.weights.settings["bits"]
        total, experts = sum(map(sum, rows)), sum(map(len, rows))
        found[f"edge-moe {bound:g}, {total / experts:.2f} bits"] = [point]
        by_layer = QuantizeChange(Rtn(), one_choice(costs, widths, int(total)), GROUP)
        found[f"by the layer's error, {bound:g}"] = [OperatingPoint(weights=by_layer.part())]
        draws = [shuffled(rows, seed) for seed in range(3)]
        found[f"its widths at random, {bound:g}"] = [
            OperatingPoint(weights=QuantizeChange(Rtn(), own, GROUP).part()) for own in draws
        ]
    return found


def shuffled(rows: Sequence[Sequence[float]], seed: int) -> tuple[tuple[float, ...], ...]:
    """Every layer's widths at random experts of it."""
    g = torch.Generator().manual_seed(seed)
    return tuple(tuple(row[i] for i in torch.randperm(len(row), generator=g).tolist()) for row in rows)


CAMERA = {
    "camera-q, 2 bits": "camera-q:2",
    "camera-q, 2.5 bits": "camera-q:2.5",
    "camera-q, 3 bits": "camera-q:bits=3:widths=2-3-4",
}


@torch.no_grad()
def each_matrix_alone(subject: Subject, ids: torch.Tensor, point: OperatingPoint) -> float:
    """KL where every matrix ranks its neurons by itself, with as many at each width as a point of CAMERA-Q has."""
    change, layers = change_of(point.weights), [layer.parts.layer for layer in subject.elastic.layers]
    assert isinstance(change, BandChange)

    def encode() -> tuple[Any, ...]:
        found = []
        for layer, row in zip(layers, change.neurons, strict=True):
            widths = torch.tensor([[float(digit) for digit in expert] for expert in row]).flatten().sort(descending=True).values
            *first, down = matrices(layer)
            own = []
            for norms in [w.float().norm(dim=2) for w in first] + [down.float().norm(dim=1)]:
                bits = torch.empty(norms.numel())
                bits[norms.flatten().argsort(descending=True)] = widths
                own.append(bits.view_as(norms))
            found.append(bands([*first, down], own, Rtn(), GROUP))
        return tuple(found)

    def logs() -> list[torch.Tensor]:
        return [subject.model(input_ids=part).logits.log_softmax(-1) for part in ids.split(8)]

    source = logs()
    with replaced(subject.model, layers, Rtn(), ("each matrix alone", change.neurons), encode):
        found = [float((p.exp() * (p - q)).sum(-1).mean()) * len(p) for p, q in zip(source, logs(), strict=True)]
    return sum(found) / len(ids)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        opened = open_model(name)
        subject = subject_of(
            opened, FrontierOptions(text=args.text, calibration_tokens=args.calibration_tokens, length=args.length)
        )
        camera = {} if args.edge else {title: [method(asked).points(subject)[0].point] for title, asked in CAMERA.items()}
        points = edge_points(subject) if args.edge else camera
        if not (args.edge or args.camera):
            points = pmq_points(subject) | rule_points(subject) | camera
        flat = [point for own in points.values() for point in own]
        texts = [f"domains/{domain}" for domain in args.domains]
        windows = [token_windows(opened.tokenizer, t, "evaluation", length=args.length, tokens=args.tokens).ids for t in texts]
        ids = torch.cat(windows)
        full, *rest = measure(opened.model, ids, [FULL, *flat], batch=8)
        measured = iter(rest)
        for title, (point,) in camera.items():
            kl = each_matrix_alone(subject, ids, point)
            yield {"model": name, "way": f"{title}, each alone", "kl": kl, "least": kl, "largest": kl, "bytes": float("nan")}
        for title, own in points.items():
            found = [next(measured) for _ in own]
            losses = [m.quality.kl for m in found]
            yield {
                "model": name,
                "way": title,
                "kl": sum(losses) / len(losses),
                "least": min(losses),
                "largest": max(losses),
                "bytes": sum(m.cost.active_expert_bytes for m in found) / len(found) / full.cost.active_expert_bytes,
            }


def show(row: dict[str, Any]) -> str:
    spread = "" if row["least"] == row["largest"] else f"  ({row['least']:.4f} to {row['largest']:.4f})"
    return f"{row['model']:>9}  {row['way']:<28} KL {row['kl']:.4f}  bytes {row['bytes']:.3f}{spread}"


def main() -> None:
    parser = domain_arguments(__doc__, MODELS, list(DOMAINS), 1024)
    parser.add_argument("--camera", action="store_true", help="CAMERA-Q alone")
    parser.add_argument("--edge", action="store_true", help="EdgeMoE alone")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    args = parser.parse_args()
    found = printed(rows(args), show, quiet=args.json)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

"""EAQuant against its "works when" lines, on text that nothing was fitted on.

    python benchmarks/smoothing.py [--models nano,nano-mix] [--domains python,prose,headers,web] [--tokens 512] [--seeds 1] [--json]

- range: the largest input of a channel over the median channel's, mean of the layers; as it is, and evened out.
- weights alone, 4 and 3 bits: KL to the source, rounded to nearest in groups of 32; as they are, and evened out.
- weights and activations in 4 bits (simulated: each token's input and each expert's activations are rounded to their own largest value):
  no smoothing, one vector per layer, a vector for every expert alone that no router reads (it cannot be folded).
- router: how many of a token's k experts stay when the router is rounded by rows, at 8, 4 and 3 bits; range to the largest weight, and
  aligned.
- floor: error of the experts' outputs at 3 bits with errors fed back, of the least-used quarter; by their own tokens alone, and with the
  floor. seeds: draws of the calibration sample.

KL in nats per token. Statistics come from the calibration sides of the four domains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from printed import domain_arguments, printed
from torch import Tensor

from moe_prism.artefact.open import open_model
from moe_prism.calibrate.run import Pass, Settings
from moe_prism.calibrate.statistics import LayerStatistics
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.decoded import matrices
from moe_prism.compress.quantize.smooth import aligned_clip, exponents, factors, rounded_router, with_floor
from moe_prism.compress.quantize.smoothed import SmoothChange
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.base import Subject
from moe_prism.model import MoELayer
from moe_prism.model.scores import router_weight
from moe_prism.options.frontier import FrontierOptions

MODELS = ["nano", "nano-mix"]
GROUP, ALPHA, STEPS, FLOOR = 32, 0.6, 4, 2.0
Row = dict[str, Any]


def in_bits(x: Tensor, bits: int = 4) -> Tensor:
    """Every row rounded to its own largest value."""
    most = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / most).clamp(min=1e-30)
    return (x / scale).round().clamp(-most - 1, most) * scale


@contextmanager
def installed(subject: Subject, functions: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """The layers' experts computed by these functions."""
    for layer, function in zip(subject.elastic.layers, functions, strict=True):
        layer.parts.layer.install(function)
    try:
        yield
    finally:
        for layer in subject.elastic.layers:
            layer.parts.layer.install(layer)


def narrow_activations(subject: Subject, own: Sequence[Tensor] | None) -> AbstractContextManager[None]:
    """Experts compute on rounded inputs and activations. own [E, d] of each layer: what an expert's inputs are divided by before."""

    def runs(layer: MoELayer, s: Tensor | None) -> Callable[..., Tensor]:
        def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in torch.unique(index).tolist():
                token, choice = torch.where(index == e)
                rows = in_bits(x[token]) if s is None else in_bits(x[token] / s[e])
                gate, up = layer.gate[e], layer.up[e]
                a = in_bits(layer.activate(rows @ gate.T, rows @ up.T))
                out.index_add_(0, token, layer.project(e, a) * weight[token, choice, None])
            return out

        return run

    layers = subject.elastic.layers
    return installed(subject, [runs(layer.parts.layer, None if own is None else own[i]) for i, layer in enumerate(layers)])


@contextmanager
def scaled_experts(layers: Sequence[MoELayer], own: Sequence[Tensor]) -> Iterator[None]:
    """Gate and up stored by `Rtn` of 4 bits, each expert times its own vector [E, d]; down as it is rounded anyway."""
    saved = [[w.clone() for w in matrices(layer)] for layer in layers]
    for layer, s in zip(layers, own, strict=True):
        *first, down = matrices(layer)
        for matrix in first:
            matrix.copy_(Rtn().decode(Rtn().encode(matrix * s[:, None, :], 4, GROUP), 4))
        down.copy_(Rtn().decode(Rtn().encode(down, 4, GROUP), 4))
    try:
        yield
    finally:
        for layer, before in zip(layers, saved, strict=True):
            for matrix, was in zip(matrices(layer), before, strict=True):
                matrix.copy_(was)


def expert_vectors(layer: MoELayer, inputs: Sequence[Tensor]) -> Tensor:
    """[E, d]: of every expert its own vector."""
    found = torch.stack([x.abs().amax(0) if len(x) else torch.ones(layer.hidden) for x in inputs]).clamp(min=1e-6)
    weights = torch.stack([w.float().abs().amax(1) for w in (layer.gate, layer.up)]).amax(0).clamp(min=1e-6)
    s = found**ALPHA / weights ** (1 - ALPHA)
    return s / s.log().mean(1, keepdim=True).exp()


def gathered(subject: Subject, seed: int, tokens: int) -> list[LayerStatistics]:
    layers = [layer.parts.layer for layer in subject.elastic.layers]
    work = Pass(subject.model, layers, Settings(collectors=("counts", "tokens"), seed=seed))
    ids = subject.calibration
    work.run(ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))][: tokens // ids.shape[1]])
    for layer in subject.elastic.layers:
        layer.parts.layer.install(layer)
    return work.statistics().layers


def model_rows(subject: Subject, ids: Tensor) -> Iterator[Row]:
    model = subject.model
    layers = [layer.parts.layer for layer in subject.elastic.layers]
    statistics = gathered(subject, 0, 1 << 20)
    samples = [
        [x for x, _ in with_floor(model, layer, own, FLOOR, subject.k)] for layer, own in zip(layers, statistics, strict=True)
    ]
    rows = [tuple(exponents(layer, x, ALPHA, STEPS).tolist()) for layer, x in zip(layers, samples, strict=True)]
    scales = [factors(row, STEPS) for row in rows]
    for title, own in (("as it is", [torch.ones(len(s)) for s in scales]), ("evened out", scales)):
        ratios = [torch.cat(x).abs().amax(0) / s for x, s in zip(samples, own, strict=True)]
        yield {"what": "range", "way": title, "value": sum(float(r.max() / r.median()) for r in ratios) / len(ratios)}

    def logs() -> list[Tensor]:
        return [model(input_ids=part).logits.log_softmax(-1) for part in ids.split(8)]

    source = logs()

    def lost() -> float:
        found = [float((p.exp() * (p - q)).sum(-1).mean()) * len(p) for p, q in zip(source, logs(), strict=True)]
        return sum(found) / len(ids)

    for bits in (4.0, 3.0):
        plain = QuantizeChange(Rtn(), bits, GROUP)
        for title, change in (("as it is", plain), ("evened out", SmoothChange(plain, tuple(rows), STEPS))):
            with change.installed(model, layers):
                yield {"what": f"weights, {bits:g} bits", "way": title, "value": lost()}
    plain = QuantizeChange(Rtn(), 4.0, GROUP)
    for title, change in (("as it is", plain), ("evened out", SmoothChange(plain, tuple(rows), STEPS))):
        with change.installed(model, layers), narrow_activations(subject, None):
            yield {"what": "both, 4 bits", "way": title, "value": lost()}
    own = [expert_vectors(layer, x) for layer, x in zip(layers, samples, strict=True)]
    with scaled_experts(layers, own), narrow_activations(subject, own):
        yield {"what": "both, 4 bits", "way": "each expert alone", "value": lost()}
    yield from router_rows(subject, ids, samples)


def router_rows(subject: Subject, ids: Tensor, samples: Sequence[Sequence[Tensor]]) -> Iterator[Row]:
    """How many of the k experts stay, on held-out inputs."""
    held_out = gathered_inputs(subject, ids)
    weights = [router_weight(subject.model, layer.parts.layer).float() for layer in subject.elastic.layers]
    for bits in (8, 4, 3):
        for title in ("to the largest", "aligned"):
            same = []
            for weight, own, x in zip(weights, samples, held_out, strict=True):
                clip = 1.0 if title == "to the largest" else aligned_clip(weight, torch.cat(list(own)), bits, subject.k)
                best, found = ((x @ w.T).topk(subject.k, 1).indices for w in (weight, rounded_router(weight, bits, clip)))
                same.append(float((best[:, :, None] == found[:, None, :]).any(2).float().mean()))
            yield {"what": f"router, {bits} bits", "way": title, "value": sum(same) / len(same)}


def gathered_inputs(subject: Subject, ids: Tensor) -> list[Tensor]:
    """[T, d] of every layer."""
    found: list[Tensor] = []
    layers = [layer.parts.layer for layer in subject.elastic.layers]

    def seen(layer: MoELayer) -> Callable[..., Tensor]:
        def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            found.append(x)
            return layer.stock(x, index, weight)

        return run

    with installed(subject, [seen(layer) for layer in layers]):
        subject.model(input_ids=ids[:8])
    return found


def floor_rows(subject: Subject, ids: Tensor, seed: int, tokens: int = 2048) -> Iterator[Row]:
    """Of few calibration tokens; the error on held-out tokens of each expert, squared, over its output's."""
    layers = [layer.parts.layer for layer in subject.elastic.layers]
    statistics, seen = gathered(subject, seed, tokens), held_out_inputs(subject, ids)
    for title, floor in (("own tokens", 0.0), ("floor of 1", 1.0), ("floor of 2", 2.0)):
        found = []
        for layer, own, inputs in zip(layers, statistics, seen, strict=True):
            count = own.values["counts"]["count"]
            least = count.argsort()[: len(count) // 4].tolist()
            samples = with_floor(subject.model, layer, own, floor, subject.k)
            few = [e for e in least if len(inputs[e]) > 3]
            found += [expert_error(layer, e, samples[e], inputs[e]) for e in few]
        yield {"what": "floor, least-used quarter", "way": title, "value": sum(found) / len(found), "seed": seed}


def expert_error(layer: MoELayer, e: int, sample: tuple[Tensor, Tensor], x: Tensor, bits: int = 3) -> float:
    rows, weight = sample
    a = layer.activations(e, rows) * weight[:, None]
    rows = rows * weight[:, None]
    own = [matrix[e] for matrix in matrices(layer)]
    grams = [rows.T @ rows, rows.T @ rows, a.T @ a] if len(rows) else [None] * 3
    gate, up, down = (Rtn().decode(Rtn().encode(w, bits, GROUP, gram), bits) for w, gram in zip(own, grams, strict=True))
    wanted = layer.project(e, layer.activations(e, x))
    found = layer.activate(x @ gate.T, x @ up.T) @ down.T
    return float((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))


def held_out_inputs(subject: Subject, ids: Tensor) -> list[list[Tensor]]:
    """Of every layer and expert its inputs."""
    layers = [layer.parts.layer for layer in subject.elastic.layers]
    work = Pass(subject.model, layers, Settings(collectors=("counts", "tokens")))
    work.run(ids)
    for layer in subject.elastic.layers:
        layer.parts.layer.install(layer)
    return [
        [own.inputs(e)[0] for e in range(layer.num_experts)] for own, layer in zip(work.statistics().layers, layers, strict=True)
    ]


@torch.no_grad()
def rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in args.models:
        opened = open_model(name)
        subject = subject_of(opened, FrontierOptions(text=args.text, calibration_tokens=8192, length=args.length))
        texts = [f"domains/{domain}" for domain in args.domains]
        windows = [token_windows(opened.tokenizer, t, "evaluation", length=args.length, tokens=args.tokens).ids for t in texts]
        ids = torch.cat(windows)
        for row in model_rows(subject, ids):
            yield {"model": name, **row}
        for seed in range(args.seeds):
            for row in floor_rows(subject, ids, seed):
                yield {"model": name, **row}


def show(row: Row) -> str:
    seed = f"  (seed {row['seed']})" if "seed" in row else ""
    return f"{row['model']:>9}  {row['what']:<26} {row['way']:<18} {row['value']:.4f}{seed}"


def main() -> None:
    parser = domain_arguments(__doc__, MODELS, list(DOMAINS), 512)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration sample, for the floor")
    args = parser.parse_args()
    found = printed(rows(args), show, quiet=args.json)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

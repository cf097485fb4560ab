"""EAQuant's three parts (arXiv 2506.13329): a vector that evens out a layer's inputs, a router rounded so that it chooses as before, and
enough tokens for every expert.

Shapes: E experts, d hidden, f neurons, k experts per token, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStatistics
from ...model import MoELayer
from ...model.scores import router_weight

LARGEST = 8  # doublings: a channel that is never used would have none
CLIPS = tuple(1 - step / 20 for step in range(11))
"""Shares of a row's largest weight that the range of a rounded router may reach to."""


@torch.no_grad()
def exponents(layer: MoELayer, inputs: Sequence[Tensor], alpha: float, steps: int, router: Tensor | None = None) -> Tensor:
    """[d] int64: what a layer's input is divided by, channel by channel, as powers of 2^(1 / steps).

    s_j is the largest over who is rounded of max|x_j|^alpha / max|W_j|^(1 - alpha); inputs [S, d] of each expert, and those of all for
    a router [E, d] that is rounded too. Who reads the input and stays as it is has no say: the one row of a shared expert's gate has
    weights near zero, which would make its channels loud for all. Whole powers of two can be folded into any type of weight without
    rounding it.
    """
    whole = torch.stack([x.abs().amax(0) if len(x) else torch.zeros(layer.hidden) for x in inputs])
    own = [w.detach().float().abs().amax(1).cpu() for w in (layer.gate, layer.up) if w is not None]
    beside = [] if router is None else [(whole.amax(0), router.detach().float().abs().amax(0).cpu())]
    every = [*zip(whole, torch.stack(own).amax(0), strict=True), *beside]
    s = torch.stack([x**alpha / w.clamp(min=1e-8) ** (1 - alpha) for x, w in every]).amax(0)
    logs = s.clamp(min=1e-30).log2()
    used = s > 0
    return torch.where(used, ((logs - logs[used].mean()).clamp(-LARGEST, LARGEST) * steps).round(), 0.0).long()


@torch.no_grad()
def with_floor(
    model: nn.Module, layer: MoELayer, statistics: LayerStatistics, floor: float, k: int
) -> list[tuple[Tensor, Tensor]]:
    """Inputs x [S, d] and routing weights [S] of every expert: the sampled ones, and others where those are few.

    An expert with fewer than `floor` times the mean gets those of other experts' tokens that came nearest to choosing it. The paper
    draws more text instead. Such a token counts with the mean weight of the expert's own.
    """
    found = [statistics.inputs(e) for e in range(layer.num_experts)]
    counts, tokens = statistics.values["counts"]["count"], statistics.values["tokens"]
    wanted = min(int(floor * float(counts.double().mean())), tokens["x"].shape[1])
    few = [e for e, (x, _) in enumerate(found) if len(x) < wanted]
    if not few:
        return found
    keys, x = _pool(tokens)
    logits = nn.functional.linear(x, router_weight(model, layer).float().cpu())
    gap = logits - logits.topk(min(k, logits.shape[1]), 1).values[:, -1:]
    mean = float(torch.cat([weight for _, weight in found]).mean())
    for e in few:
        own, weight = found[e]
        other = ~torch.isin(keys, tokens["key"][e, : len(own)])
        nearest = gap[:, e].masked_fill(~other, -torch.inf).argsort(descending=True)[: min(wanted - len(own), int(other.sum()))]
        more = torch.full((len(nearest),), float(weight.mean()) if len(weight) else mean)
        found[e] = torch.cat([own, x[nearest]]), torch.cat([weight, more])
    return found


def factors(exponents: Tensor | Sequence[int], steps: int) -> Tensor:
    """[d] float32: what exponents stand for."""
    return 2.0 ** (torch.as_tensor(exponents, dtype=torch.float32) / steps)


def _pool(tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(keys [P], inputs [P, d]) of all sampled tokens, each once."""
    kept = torch.arange(tokens["key"].shape[1]) < tokens["kept"][:, None]
    keys, x = tokens["key"][kept], tokens["x"][kept]
    order = keys.argsort(stable=True)
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    return keys[order][first], x[order][first].float()


def rounded_router(weight: Tensor, bits: int, clip: float) -> Tensor:
    """Rows [E, d] rounded to nearest, each to its own scale: its largest weight times clip over the largest code."""
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True) * clip / most).clamp(min=1e-30)
    rounded: Tensor = (weight / scale).round().clamp(-most - 1, most) * scale
    return rounded


@torch.no_grad()
def aligned_clip(weight: Tensor, x: Tensor, bits: int, k: int) -> float:
    """Of CLIPS the one under which a router [E, d] rounds to the least error of its logits on x [S, d], squared and as a share, plus
    the KL of the probabilities of the k best.
    """
    logits = nn.functional.linear(x, weight)
    top = logits.topk(k, 1)

    def lost(clip: float) -> float:
        found = nn.functional.linear(x, rounded_router(weight, bits, clip))
        p, q = top.values.log_softmax(1), found.gather(1, top.indices).log_softmax(1)
        return float((found - logits).square().sum() / logits.square().sum() + (p.exp() * (p - q)).sum(1).mean())

    return min(CLIPS, key=lost)

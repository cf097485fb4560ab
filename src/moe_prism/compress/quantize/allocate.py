"""Which expert is stored in how many bits: what an expert means to its layer, what a width does to it, and the best choice of both.

PMQ of MC-MoE (arXiv 2410.06270, section 3.1). Shapes: E experts, W widths, S sampled tokens, d hidden, f neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStatistics
from ...errors import UsageError
from ...model import MoELayer
from ..codec import Codec
from .decoded import GONE, matrices

ROWS = 256  # sampled tokens that an expert is tried on
SEEN = 16  # tokens below which an expert is tried on those of all others
RARE = 0.05  # of the mean count: what an expert counts that was hardly seen


@dataclass(frozen=True)
class Importance:
    """Exponents of how often an expert is chosen, of the weight that it gets, and of the error that a width makes."""

    chosen: float
    weight: float
    error: float


@torch.no_grad()
def width_costs(
    layer: MoELayer, statistics: LayerStatistics, codec: Codec, group: int, widths: Sequence[float], how: Importance
) -> Tensor:
    """[E, W] float64: what storing an expert at a width costs its layer, the errors relative to the output of the layer's experts.

    An expert that was hardly seen is tried on the sampled tokens of all, and counts as one that is rare: its error would else be nothing.
    """
    counts = statistics.values["counts"]
    count = counts["count"].double().clamp(min=RARE * float(counts["count"].double().mean()) + 1e-9)
    mean_weight = counts["weight_sum"] / counts["count"].clamp(min=1)
    gate = count * torch.where(counts["count"] > 0, mean_weight, mean_weight.mean())
    squared, output = _errors(layer, statistics, codec, group, widths)
    error = (squared * count[:, None] / (output * count).sum().clamp(min=1e-30)).sqrt()
    share, weight = count / count.sum(), gate / gate.sum().clamp(min=1e-30)
    return share[:, None] ** how.chosen * weight[:, None] ** how.weight * error**how.error


def _errors(
    layer: MoELayer, statistics: LayerStatistics, codec: Codec, group: int, widths: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """([E, W] mean g²|o - o'|² over an expert's tokens, [E] mean g²|o|²): g its routing weight, o its output, o' that of a width."""
    samples = [tuple(t[:ROWS] for t in statistics.inputs(e)) for e in range(layer.num_experts)]
    pooled = tuple(torch.cat(parts)[:: max(1, layer.num_experts // 4)][:ROWS] for parts in zip(*samples, strict=True))
    samples = [own if len(own[1]) >= SEEN else pooled for own in samples]
    exact = [_output(layer, [m[e].float() for m in matrices(layer)], x) * g[:, None] for e, (x, g) in enumerate(samples)]
    found = torch.zeros(layer.num_experts, len(widths), dtype=torch.float64)
    for w, bits in enumerate(widths):
        if bits == GONE:
            found[:, w] = torch.stack([_mean_square(o) for o in exact])
            continue
        stored = [codec.decode(codec.encode(matrix, bits, group), bits) for matrix in matrices(layer)]
        for e, (x, g) in enumerate(samples):
            found[e, w] = _mean_square(_output(layer, [m[e] for m in stored], x) * g[:, None] - exact[e])
    return found, torch.stack([_mean_square(o) for o in exact])


def _output(layer: MoELayer, own: Sequence[Tensor], x: Tensor) -> Tensor:
    """[S, d] of an expert whose matrices are `own`. Biases are left out: no width changes them."""
    *first, down = own
    pre = [nn.functional.linear(x, w) for w in first]
    return nn.functional.linear(layer.activate(None if len(pre) == 1 else pre[0], pre[-1]), down)


def _mean_square(o: Tensor) -> Tensor:
    return o.double().square().sum(1).mean() if len(o) else torch.zeros((), dtype=torch.float64)


def cheapest(costs: Tensor, widths: Sequence[int], total: int, each: Sequence[int] = ()) -> list[int]:
    """The width of every expert with the least sum of costs [E, W] that takes at most `total` bits; exact.

    each: widths that some expert must have (PMQ asks for one at 2 and one at 3 bits). Dynamic programming over experts, bits spent and
    which of these are there. UsageError where no choice fits.
    """
    experts, marks = len(costs), {width: 1 << i for i, width in enumerate(each)}
    best = np.full((1 << len(marks), total + 1), np.inf)
    best[0, 0] = 0.0
    taken = np.zeros((experts, 1 << len(marks), total + 1), np.int64)  # (mask before) * W + width, of the best way here
    for e in range(experts):
        found = np.full_like(best, np.inf)
        for w, (width, cost) in enumerate(zip(widths, costs[e].tolist(), strict=True)):
            for mask in range(len(best)) if width <= total else ():
                there, candidate = mask | marks.get(width, 0), best[mask, : total + 1 - width] + cost
                better = candidate < found[there, width:]
                np.copyto(found[there, width:], candidate, where=better)
                np.copyto(taken[e, there, width:], mask * len(widths) + w, where=better)
        best = found
    mask, spent = len(best) - 1, int(best[-1].argmin())
    if not np.isfinite(best[-1, spent]):
        raise UsageError(
            f"{total} bits for {experts} experts leave no choice of {', '.join(map(str, widths))} bits", "ask for more bits"
        )
    chosen: list[int] = []
    for e in range(experts - 1, -1, -1):
        before, w = divmod(int(taken[e, mask, spent]), len(widths))
        chosen.append(widths[w])
        mask, spent = before, spent - widths[w]
    return chosen[::-1]

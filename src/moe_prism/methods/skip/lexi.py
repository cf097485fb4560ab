"""LExI (arXiv 2509.02753): experts per layer from the weights alone, by what fewer of them do to random inputs.

Every layer routes rows drawn from a normal distribution and computes them with all k experts and with the first n. The distance of the two
outputs (Frobenius norm) is what n costs this layer. The paper then searches for counts with a genetic algorithm; the sum of costs under a
total has an exact minimum, which is taken here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UsageError
from ...frontier.allocation import exact
from ...model.router import Router
from ...point import RoutingStage
from ...routing.base import Routed
from ...routing.patterns import whole_total
from ...routing.top_n import TopN
from ..base import Subject
from .base import Fitted, SkipMethod, fitted_counts, given
from .profile import own_rule

ROWS, SEED = 1024, 0


class Lexi(SkipMethod):
    """Counts by an exact program over what fewer experts do to a layer's output for random inputs. Reads no text."""

    paper = "arXiv 2509.02753"
    needs = ("expert weights",)

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        total = whole_total(subject.layers, subject.k, given(self.name, mean))
        key = "distances of random inputs"
        if key not in subject.cache:
            subject.cache[key] = distances(subject)
        rows: list[list[float]] = subject.cache[key]
        best = exact([[(n + 1.0, loss) for n, loss in enumerate(row)] for row in rows], total)
        stage = RoutingStage(layers=tuple(choice + 1 for choice in best.choices))
        return fitted_counts(stage, {"profile": [[round(loss, 6) for loss in row] for row in rows], "predicted_loss": best.loss})


@torch.no_grad()
def distances(subject: Subject) -> list[list[float]]:
    """[L][k]: norm of what changes with n = 1..k experts, over ROWS random inputs. UsageError where weights are not in memory."""
    generator, found = torch.Generator().manual_seed(SEED), []
    scales = own_rule(subject)
    for number, elastic in enumerate(subject.elastic.layers):
        layer = elastic.parts.layer
        if layer.up.is_meta:
            raise UsageError(
                "method 'lexi' runs every layer by itself, and here they are read one by one", "leave --low-memory out"
            )
        x = torch.randn(ROWS, layer.hidden, generator=generator).to(layer.up.device, layer.input_dtype)
        index, weight = Router(subject.model, layer).route(x)
        full = layer.stock(x, index, weight)
        row = [_distance(subject, number, (x, index, weight), full, n, scales) for n in range(1, index.shape[1])]
        found.append([*row, 0.0])
    return found


def _distance(subject: Subject, number: int, routed: tuple[Tensor, Tensor, Tensor], full: Tensor, n: int, scales: bool) -> float:
    layer = subject.elastic.layers[number].parts.layer
    stage = TopN([RoutingStage(layers=(n,) * subject.layers, keep_mass=scales)])
    after = stage(Routed(*routed, number, layer.num_experts, layer.num_experts + len(layer.extra or ())))
    kept = (after.index >= 0).nonzero()[:, 1].view(-1, n) if bool(((after.index >= 0).sum(1) == n).all()) else None
    index, weight = (after.index, after.weight) if kept is None else (after.index.gather(1, kept), after.weight.gather(1, kept))
    return float((layer.stock(routed[0], index, weight) - full).float().norm())

"""What skip methods measure on calibration text: the loss of layers alone, of whole plans, and the routing weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...elastic.observe import View, ranked, recorded, viewed
from ...frontier.measure import LOGIT_ROWS, measure
from ...point import OperatingPoint, RoutingStage
from ...routing.base import SkipStage
from ..base import Subject

Counts = tuple[int, ...]
TRIES = 4  # moves that are measured of those that look best
ROUNDS = 12


def profile(subject: Subject, *, isolated: bool = False) -> list[list[float]]:
    """loss [L][k]: KL to the full model in nats per token with n = 1..k experts in one layer, on the calibration windows.

    The other layers are whole; isolated: the layers after it have one expert each, and the loss is against that layer whole.
    """
    key = f"profile, isolated {isolated}"
    if key not in subject.cache:
        subject.cache[key] = _profiled(subject, isolated)
    return subject.cache[key]  # type: ignore[no-any-return]


def _profiled(subject: Subject, isolated: bool) -> list[list[float]]:
    layers, k = len(subject.elastic.layers), subject.k
    counts = range(1, k + 1) if isolated else range(1, k)
    after = 1 if isolated else k
    plans = [(*(k,) * layer, n, *(after,) * (layers - layer - 1)) for layer in range(layers) for n in counts]
    rows = torch.tensor(losses(subject, plans, "losses of layers"), dtype=torch.float64).view(layers, len(counts)).tolist()
    return [[loss - row[-1] for loss in row] if isolated else [*row, 0.0] for row in rows]


def losses(subject: Subject, plans: Sequence[Counts], stage: str = "losses of plans") -> list[float]:
    """KL to the full model of plans of counts [L], on the calibration windows. stage: what a report calls it."""
    own = own_rule(subject)
    points = [OperatingPoint(routing=(RoutingStage(layers=counts, keep_mass=own),)) for counts in plans]
    ids = subject.calibration
    batch = max(1, LOGIT_ROWS // ids.shape[1])
    with subject.report(stage) as update:
        found = measure(subject.model, ids, points, batch=batch, progress=update)
    return [each.quality.kl for each in found]


def refine(subject: Subject, counts: Counts) -> tuple[Counts, float]:
    """A plan of the same total and no larger loss, and that loss: one expert at a time moves to another layer, while that pays.

    What a move is worth is guessed from the plan with one expert more in one layer and with one less in another; the moves that look
    best are measured. 2 L + 4 runs of the calibration windows per move.
    """
    key = f"refined {counts}"
    if key not in subject.cache:
        subject.cache[key] = _refined(subject, counts)
    return subject.cache[key]  # type: ignore[no-any-return]


def _refined(subject: Subject, counts: Counts) -> tuple[Counts, float]:
    loss = losses(subject, [counts], "loss of the plan")[0]
    for number in range(1, ROUNDS + 1):
        stage = f"losses of plans, round {number} of at most {ROUNDS}"
        more = [layer for layer, n in enumerate(counts) if n < subject.k]
        less = [layer for layer, n in enumerate(counts) if n > 1]
        if not more or not less:
            break
        neighbours = [*(_moved(counts, a, None) for a in more), *(_moved(counts, None, b) for b in less)]
        around = losses(subject, neighbours, stage)
        gain, cost = dict(zip(more, around, strict=False)), dict(zip(less, around[len(more) :], strict=True))
        moves = sorted((gain[a] + cost[b] - loss, a, b) for a in more for b in less if a != b)[:TRIES]
        if not moves:
            break
        tried = [_moved(counts, a, b) for _, a, b in moves]
        best, plan = min(zip(losses(subject, tried, f"{stage}, moves"), tried, strict=True))
        if best >= loss:
            break
        loss, counts = best, plan
    return counts, loss


def _moved(counts: Counts, up: int | None, down: int | None) -> Counts:
    return tuple(n + (layer == up) - (layer == down) for layer, n in enumerate(counts))


def scores(subject: Subject) -> list[Tensor]:
    """The router's probabilities of all experts, [S, E] of every layer over the calibration windows, largest first."""
    return [rows.sort(dim=1, descending=True).values for rows in views(subject, "scores", lambda routed: routed.scores())]


@torch.no_grad()
def views(subject: Subject, key: str, view: View) -> list[Tensor]:
    """A view of the router's choice, [S, ...] of every layer over the calibration windows of the full model, in their order."""
    if f"view {key}" not in subject.cache:
        with subject.elastic.at(subject.elastic.full_step), viewed(subject.elastic, view) as found:
            for rows in torch.split(subject.calibration, 4):
                subject.model(input_ids=rows.to(subject.model.device), use_cache=False, logits_to_keep=1)
        subject.cache[f"view {key}"] = [torch.cat(rows) for rows in found]
    return subject.cache[f"view {key}"]  # type: ignore[no-any-return]


@torch.no_grad()
def samples(subject: Subject, stage: type[SkipStage] = SkipStage) -> list[Tensor]:
    """What a stage ranks experts by, [S, k] of every layer over the calibration windows, largest first; by default routing weights."""
    rank_by = stage.rank_by
    key = f"samples of {rank_by.__module__}.{rank_by.__qualname__}"
    if key not in subject.cache:
        ids = subject.calibration
        with subject.elastic.at(subject.elastic.full_step), recorded(subject.elastic, rank_by) as found:
            for rows in torch.split(ids, 4):
                subject.model(input_ids=rows.to(subject.model.device), use_cache=False, logits_to_keep=1)
        subject.cache[key] = ranked(found)
    return subject.cache[key]  # type: ignore[no-any-return]


def own_rule(subject: Subject) -> bool:
    """Whether the model's router would scale the weights of fewer experts up (see `normalises`)."""
    return subject.elastic.normalises()

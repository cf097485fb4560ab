"""Train the predictor of block norms for what it is used for: choosing the slots whose loss costs least.

The ridge fit predicts norms well, but a norm says nothing of direction or of what later layers make of it. Here the same weights go on
from the fit, by gradient: the model runs below full budget under the threshold rule, and its KL to itself at full budget plus a price
per kept slot is minimised. A slot is kept or not; the gradient passes as if a share sigmoid((log v - log level) / TEMPERATURE) of it were
kept (straight-through). Everything else is frozen, the router included, so full budget is exact and no byte is added. Levels are then
fitted again. (The paper, arXiv 2510.19366, tunes the router itself by next-token loss, and thereby changes the model at full budget.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.run import backbone_of
from ..elastic import Slots
from ..elastic.layer import ElasticLayer
from ..elastic.rules.threshold import Threshold, fit_cutoffs, kept_shares, pool_cutoffs
from ..elastic.scorers.ridge import CEILING, Ridge, features
from ..elastic.side_tensors import CUTOFFS, RIDGE, SHARES
from ..frontier.measure import measure
from ..point import FULL
from .base import RecoverJob

RATE = 1e-3
BATCH = 2  # windows
BUDGETS = (0.25, 0.75)  # drawn evenly from this range
TEMPERATURE = 0.5  # of log values
PRICED_AT = (0.25, 0.5, 0.75)
PRICE_WINDOWS, LEVEL_WINDOWS = 4, 32


class _Trained:
    """One layer under training. budget None runs the layer in full."""

    def __init__(self, layer: ElasticLayer) -> None:
        self.layer, self.parts = layer, layer.parts
        scorer, rule = layer.scorer("ridge"), layer.rule("threshold")
        assert isinstance(scorer, Ridge) and isinstance(rule, Threshold)
        self.scale, self.rule = scorer.scale, rule
        self.weight = nn.Parameter(scorer.weight.clone())
        self.budget: float | None = None
        self.share = torch.zeros(())  # kept slots / all slots of the last call, with its gradient

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if self.budget is None:
            return self.parts.layer.native(x, index, weight)
        valid = (index >= 0) & (index < self.parts.layer.num_experts)
        pieces = [(e, (index == e).reshape(-1).nonzero()[:, 0]) for e in torch.unique(index[valid]).tolist()]
        order = torch.cat([rows for _, rows in pieces])
        k = index.shape[1]
        logs = torch.cat([self._predict(e, x.detach()[rows // k]) for e, rows in pieces])  # rows in `order`
        logs = torch.zeros(index.numel(), self.parts.n_sub, device=x.device).index_copy(0, order, logs)
        mask = self._mask(x, index, weight, valid, logs.view(*index.shape, -1)).flatten(0, 1)
        parts = [self._part(e, x[rows // k], mask[rows]) for e, rows in pieces]
        out = torch.cat(parts) * weight.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // k, out)

    def _predict(self, expert: int, x: Tensor) -> Tensor:
        """Log norms [S, N]."""
        with torch.no_grad():
            z = features(self.parts, x, expert, self.scale[expert])
        return (z @ self.weight[expert].T).clamp(max=CEILING)

    def _mask(self, x: Tensor, index: Tensor, weight: Tensor, valid: Tensor, logs: Tensor) -> Tensor:
        """[T, k, N]: 1 where kept, 0 elsewhere, with the gradient of a soft choice."""
        assert self.budget is not None
        budget = torch.full((len(x),), self.budget, device=x.device)
        slots = Slots(x, index, weight, valid, self.parts.n_sub, lambda: logs.detach().exp())
        keep = self.rule.keep(slots, budget).float()
        values = logs + weight.detach().float().abs().clamp(min=1e-30).log()[:, :, None]
        soft = torch.sigmoid((values - self.rule.level(budget).clamp(min=1e-30).log()[:, None, None]) / TEMPERATURE)
        self.share = soft[valid].mean()
        return keep + (soft - soft.detach()) * valid[:, :, None]

    def _part(self, expert: int, x: Tensor, mask: Tensor) -> Tensor:
        layer = self.parts.layer
        a = layer.activations(expert, x) * mask.to(x.dtype).repeat_interleave(self.parts.block, 1)
        y = layer.project(expert, a)
        return y if layer.down_bias is None else y + layer.down_bias[expert] * (mask > 0).any(1, keepdim=True)


def train(job: RecoverJob) -> dict[str, Any]:
    """The method: `ridge` and `levels` of every layer. Short enough to be started again rather than resumed."""
    job.model.requires_grad_(False)
    price = _price(job)
    layers = [_Trained(layer) for layer in job.elastic.layers]
    try:
        for layer in layers:
            layer.parts.layer.install(layer)
        with job.report("train") as update:
            _steps(job, layers, price, update)
    finally:
        for layer in layers:
            layer.parts.layer.install(layer.layer)
    for layer in layers:
        layer.parts.tensors[RIDGE] = layer.weight.detach().to("cpu", torch.bfloat16)
        layer.layer.forget()
    for i, (levels, shares) in enumerate(_levels(job)):
        job.save(i, {RIDGE: job.elastic.layers[i].parts.tensors[RIDGE], CUTOFFS: levels, SHARES: shares})
    return {"steps": job.steps, "rate": RATE, "budgets": list(BUDGETS), "seed": job.seed}


def _steps(
    job: RecoverJob, layers: Sequence[_Trained], price: Callable[[float], float], update: Callable[[int, int], None]
) -> None:
    weights = [layer.weight for layer in layers]  # all that is trained
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(job.seed)
    order = torch.zeros(0, dtype=torch.long)
    for step in range(job.steps):
        if len(order) < BATCH:
            order = torch.randperm(len(job.ids), generator=generator)
        rows, order = job.ids[order[:BATCH]].to(job.model.device), order[BATCH:]
        low, high = BUDGETS
        budget = low + (high - low) * float(torch.rand(1, generator=generator))
        warm, cosine = min(1.0, (step + 1) / (0.1 * job.steps)), 0.5 + 0.5 * math.cos(math.pi * step / job.steps)
        optimizer.param_groups[0]["lr"] = RATE * warm * cosine
        with torch.no_grad():
            source = _log_probabilities(job.model, layers, rows, None)
        found = _log_probabilities(job.model, layers, rows, budget)
        kl = (source.exp() * (source - found)).sum(-1).mean()
        loss = kl + price(budget) * torch.stack([layer.share for layer in layers]).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        update(step + 1, job.steps)


def _log_probabilities(model: Any, layers: Sequence[_Trained], rows: Tensor, budget: float | None) -> Tensor:
    for layer in layers:
        layer.budget = budget
    logits: Tensor = model(input_ids=rows, use_cache=False).logits
    return logits.float().flatten(0, 1).log_softmax(-1)


def _price(job: RecoverJob) -> Callable[[float], float]:
    """KL that a slot more saves, as a share of all slots: the slope of ln KL = a - b budget, fitted to the untrained model."""
    ids = job.ids[:: max(1, len(job.ids) // PRICE_WINDOWS)][:PRICE_WINDOWS]
    points = [FULL.with_slots(budget) for budget in PRICED_AT]
    kls = [max(found.quality.kl, 1e-9) for found in measure(job.model, ids, points, batch=1)]
    budgets = torch.tensor([[1.0, -budget] for budget in PRICED_AT], dtype=torch.float64)
    a, b = torch.linalg.lstsq(budgets, torch.tensor(kls, dtype=torch.float64).log()[:, None]).solution[:, 0].tolist()
    return lambda budget: max(0.0, b * math.exp(a - b * budget))


@torch.no_grad()
def _levels(job: RecoverJob) -> list[tuple[Tensor, Tensor]]:
    """Levels for the trained predictor, and the share of a layer's slots that reach each, from the full model on calibration windows."""
    values: list[list[Tensor]] = [[] for _ in job.elastic.layers]

    def watch(i: int, layer: ElasticLayer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def experts(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            valid = (index >= 0) & (index < layer.parts.layer.num_experts)
            norms = layer.scorer("ridge")(x, index.clamp(0, layer.parts.layer.num_experts - 1))
            slots = Slots(x, index, weight, valid, layer.parts.n_sub, lambda: norms)
            values[i].append(slots.values()[valid].flatten().cpu())
            return layer.parts.layer.native(x, index, weight)

        return experts

    try:
        for i, layer in enumerate(job.elastic.layers):
            layer.parts.layer.install(watch(i, layer))
        ids = job.ids[:: max(1, len(job.ids) // LEVEL_WINDOWS)][:LEVEL_WINDOWS]
        with job.report("levels") as update:
            for done in range(0, len(ids), BATCH):
                backbone_of(job.model)(input_ids=ids[done : done + BATCH].to(job.model.device), use_cache=False)
                update(min(done + BATCH, len(ids)), len(ids))
    finally:
        for layer in job.elastic.layers:
            layer.parts.layer.install(layer)
    own = [fit_cutoffs(torch.cat(v), torch.ones(sum(len(x) for x in v))) for v in values]
    levels = own if job.sensitivity is None else pool_cutoffs(own, list(job.sensitivity))
    return [(level, kept_shares(alone, level)) for alone, level in zip(own, levels, strict=True)]

"""Train the router of sub-experts, and nothing else: the paper's way to a model of several K (arXiv 2510.19366, section on fine-tuning).

The model is one that `reslice` wrote: E N experts, k N per token, whose N router rows of an expert are equal at first. So the untrained
router takes whole experts, and training tells sub-experts apart. A step runs the model at one K, the K largest of the k N weights that
the router gives. `rising` goes evenly from k to k N over the steps, as the paper does; `drawn` draws each of them evenly. The loss
is that of the next token (the paper's), or KL to the source model, which is this one with its first rows at k N.

A step's windows and K follow from the seed and its number alone, so a run that was interrupted goes on to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CorruptError
from ..model import MoELayer, find_layers
from ..model.router import Router

BATCH = 4  # windows of a step
WARM = 0.1  # of the steps; the rate then falls evenly to 0
DECAY, CLIP = 0.01, 1.0
EVERY = 10  # steps between two states on disk
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class RouterJob:
    """A resliced model in memory (float32), windows ids [n, length], and where a state of the training is kept.

    lowest: K of the source model, k. normalises: whether the router divides by the sum over the chosen experts.
    state: the last one that was kept, {} for none; save(step, tensors) keeps one.
    """

    model: Any
    ids: Tensor
    lowest: int
    highest: int
    normalises: bool
    steps: int
    loss: str
    curriculum: str
    rate: float
    seed: int
    state: Mapping[str, Tensor]
    save: Callable[[int, dict[str, Tensor]], None]
    report: Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


class Fewer:
    """One layer's experts, of which a token takes those with the `count` largest weights."""

    def __init__(self, layer: MoELayer, normalises: bool) -> None:
        self.layer, self.normalises, self.count = layer, normalises, 0

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if self.count < index.shape[1]:
            order = weight.detach().float().abs().sort(dim=1, descending=True, stable=True).indices[:, : self.count]
            kept = weight.gather(1, order)
            if self.normalises:
                kept = kept * (weight.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
            index, weight = index.gather(1, order), kept
        return self.layer.stock(x, index, weight)


def trained_names(model: Any, layers: Sequence[MoELayer]) -> list[str]:
    """The parameters that are trained: those of the routers with an entry per expert, by their full names."""
    return [
        f"{router.name}.{row.path}"
        for router in (Router(model, layer) for layer in layers)
        for row in router.rows
        if isinstance(row.get(), nn.Parameter)
    ]


def k_of(job: RouterJob, step: int) -> int:
    """K of a step."""
    if job.curriculum == "rising":
        return round(job.lowest + (job.highest - job.lowest) * step / job.steps)
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step)
    return job.lowest + int(torch.randint(job.highest - job.lowest + 1, (1,), generator=generator))


def windows_of(job: RouterJob, step: int) -> Tensor:
    """The windows [BATCH, length] of a step: every one once, in a drawn order, before any comes again."""
    per_round = max(1, len(job.ids) // BATCH)
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 - 1 - step // per_round)
    order = torch.randperm(len(job.ids), generator=generator)
    place = step % per_round * BATCH
    return job.ids[order[place : place + BATCH]]


def train(job: RouterJob) -> dict[str, Tensor]:
    """The method. Returns the trained parameters by their full names; the model keeps them."""
    layers = find_layers(job.model)
    names = trained_names(job.model, layers)
    job.model.requires_grad_(False)
    parameters = [job.model.get_parameter(name).requires_grad_(True) for name in names]
    first = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=job.rate, weight_decay=DECAY)
    begin = _restore(job, dict(zip(names, parameters, strict=True)), optimizer)
    few = [Fewer(layer, job.normalises) for layer in layers]
    for one in few:
        one.layer.install(one)
    try:
        with job.report("train") as update:
            for step in range(begin, job.steps):
                _step(job, step, few, parameters, first, optimizer)
                if (step + 1) % EVERY == 0 and step + 1 < job.steps:
                    job.save(step + 1, _state(names, parameters, optimizer))
                update(step + 1, job.steps)
    finally:
        for one in few:
            one.layer.uninstall()
        job.model.requires_grad_(False)
    return {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}


def _step(
    job: RouterJob,
    step: int,
    few: Sequence[Fewer],
    parameters: list[nn.Parameter],
    first: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    rows = windows_of(job, step)
    warm = max(1, round(WARM * job.steps))
    optimizer.param_groups[0]["lr"] = job.rate * min((step + 1) / warm, (job.steps - step) / max(1, job.steps - warm))
    wanted = None
    if job.loss == "kl":
        with torch.no_grad(), _values(parameters, first):
            wanted = _log_probabilities(job, few, rows, job.highest)
    found = _log_probabilities(job, few, rows, k_of(job, step))
    loss = nn.functional.nll_loss(found, rows[:, 1:].reshape(-1)) if wanted is None else _kl(wanted, found)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()


def _log_probabilities(job: RouterJob, few: Sequence[Fewer], rows: Tensor, count: int) -> Tensor:
    for one in few:
        one.count = count
    logits: Tensor = job.model(input_ids=rows, use_cache=False).logits
    return logits[:, :-1].float().flatten(0, 1).log_softmax(-1)


def _kl(wanted: Tensor, found: Tensor) -> Tensor:
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


@contextmanager
def _values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in parameters, for the length of a block."""
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value


def _state(names: Sequence[str], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in zip(names, parameters, strict=True):
        found[f"value.{name}"] = parameter.detach().clone()
        found |= {f"{moment}.{name}": optimizer.state[parameter][moment].clone() for moment in MOMENTS}
    return found


def _restore(job: RouterJob, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put a kept state in place; the number of steps that it has."""
    if not job.state:
        return 0
    step = int(job.state["step"])
    for name, parameter in parameters.items():
        values = [job.state.get(f"{kind}.{name}") for kind in ("value", *MOMENTS)]
        if any(value is None or value.shape != parameter.shape for value in values):
            raise CorruptError(f"the kept state of the training has no '{name}'", "use --force to start again")
        parameter.data = values[0].clone()  # type: ignore[union-attr]
        moments = dict(zip(MOMENTS, (value.clone() for value in values[1:] if value is not None), strict=True))
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step

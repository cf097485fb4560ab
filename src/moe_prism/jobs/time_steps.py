"""Real decoding steps of a model: a batch of distinct sequences with their caches, at fewer experts per token, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache_names import cache_argument, made_cache
from ..calibrate.run import backbone_of, input_device
from ..errors import UsageError
from ..forecast.distinct import Routing
from ..model import MoELayer

Switch = Callable[[], Any]
"""Makes a context manager in which the model runs at one point."""


@contextmanager
def fewer_experts(layers: Sequence[MoELayer], chosen: int) -> Iterator[None]:
    """Every token takes its `chosen` heaviest experts, weights as they are; the model's own experts function computes them."""
    for layer in layers:
        layer.install(_trimmed(layer, chosen))
    try:
        yield
    finally:
        for layer in layers:
            layer.uninstall()


def _trimmed(layer: MoELayer, chosen: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if chosen < index.shape[1]:
            weight, order = weight.topk(chosen, dim=1)
            index = index.gather(1, order)
        return layer.native(x, index, weight)

    return run


@torch.no_grad()
def measure_routing(
    model: Any, layers: Sequence[MoELayer], ids: Tensor, *, batch: int = 8, progress: Callable[[int, int], None] | None = None
) -> Routing:
    """How often each expert is a token's heaviest, second heaviest, ... choice over windows ids [n, length]."""
    from ..elastic.runtime import experts_per_token

    counts = [torch.zeros(experts_per_token(model, layer), layer.num_experts, dtype=torch.int64) for layer in layers]

    def counting(layer: MoELayer, count: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            ranked = index.gather(1, weight.abs().argsort(dim=1, descending=True)).cpu()
            for rank in range(min(len(count), ranked.shape[1])):
                valid = ranked[:, rank][(ranked[:, rank] >= 0) & (ranked[:, rank] < layer.num_experts)]
                count[rank] += torch.bincount(valid, minlength=layer.num_experts)
            return layer.native(x, index, weight)

        return run

    for layer, count in zip(layers, counts, strict=True):
        layer.install(counting(layer, count))
    try:
        for start in range(0, len(ids), batch):
            backbone_of(model)(input_ids=ids[start : start + batch].to(input_device(model)), use_cache=False)
            if progress:
                progress(min(start + batch, len(ids)), len(ids))
    finally:
        for layer in layers:
            layer.uninstall()
    return Routing(tuple((count / ids.numel()).double().numpy() for count in counts), ids.numel())


@dataclass
class Timed:
    """Seconds per step of each turn at one point, and the tokens attended to."""

    seconds: list[float] = field(default_factory=list)
    contexts: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The fastest turn: what a busy machine disturbed least."""
        return min(self.seconds)

    @property
    def context(self) -> float:
        """Mean over the turns."""
        return sum(self.contexts) / len(self.contexts)

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


LEAST_TURNS, MOST_TURNS, STEPS = 2, 4, 3


def needed_tokens(points: int) -> int:
    """Tokens after the prompt that `time_steps` may use up."""
    return (1 + MOST_TURNS) * STEPS * points


@torch.no_grad()
def time_steps(model: Any, ids: Tensor, switches: Sequence[Switch], *, prompt: int, seconds: float) -> list[Timed]:
    """Time decoding steps of the batch ids [B, length] at every point in turn: a round to warm up, then 2 to 4 within about `seconds`.

    The sequences' own tokens are fed, so all points see the same text. The caches grow through all rounds and every round visits all
    points, forwards and backwards in turn. UsageError if the windows are shorter than prompt + `needed_tokens`.
    """
    needed = prompt + needed_tokens(len(switches))
    if ids.shape[1] < needed:
        raise UsageError(f"windows of {ids.shape[1]} tokens are too short for {needed}", "measure fewer points or longer windows")
    ids = ids.to(input_device(model))
    cache = made_cache(model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1))
    found, at, until = [Timed() for _ in switches], prompt, 0.0
    for turn in range(1 + MOST_TURNS):
        if turn == 1:
            until = time.monotonic() + seconds
        if turn > LEAST_TURNS and time.monotonic() > until:
            break
        pairs = list(zip(switches, found, strict=True))
        for switch, timed in pairs if turn % 2 else pairs[::-1]:
            with switch():
                took = mean_step(model, ids[:, at : at + STEPS], cache)
            if turn:
                timed.seconds.append(took)
                timed.contexts.append(at + (STEPS + 1) / 2)
            at += STEPS
    return found


def mean_step(model: Any, ids: Tensor, cache: Any) -> float:
    """Mean seconds of the steps that feed ids [B, steps] one by one."""
    _wait()
    kept = cache_argument(model, cache)
    began = time.perf_counter()
    for at in range(ids.shape[1]):
        model(input_ids=ids[:, at : at + 1], use_cache=True, **kept)
    _wait()
    return (time.perf_counter() - began) / ids.shape[1]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

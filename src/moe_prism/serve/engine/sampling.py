"""Drawing tokens: every request with its own temperature, nucleus and random numbers, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..requests import Sampling, TokenLogprob


class Sampler:
    """One request's random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[bool]]:
    """Next token of every row of logits [R, V] (float32), and whether the row was usable (no NaN, no infinity)."""
    best, token = logits.max(dim=-1)
    usable = torch.isfinite(best).tolist()
    tokens: list[int] = token.tolist()
    hot = [i for i, s in enumerate(samplers) if s.sampling.temperature > 0 and usable[i]]
    if hot:
        for i, drawn in zip(hot, _nucleus(logits[hot], [samplers[i] for i in hot]), strict=True):
            tokens[i] = drawn
    return tokens, usable


def _nucleus(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Inverse transform over the tokens from most to least likely, cut where their sum passes top_p."""
    temperature = torch.tensor([s.sampling.temperature for s in samplers], dtype=torch.float64)
    top_p = torch.tensor([s.sampling.top_p for s in samplers], dtype=torch.float64)
    uniform = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64)
    # a token may win by more than a float can hold at a temperature near 0
    scaled = (logits.double().cpu() - logits.double().cpu().max(dim=-1, keepdim=True).values) / temperature[:, None]
    values, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    share = values.cumsum(-1)
    kept = torch.searchsorted(share, top_p[:, None]).clamp(max=share.shape[1] - 1)  # last token of the nucleus
    target = uniform[:, None] * share.gather(1, kept)
    position = torch.minimum(torch.searchsorted(share, target, right=True), kept)
    return order.gather(1, position)[:, 0].tolist()


def logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probability of tokens [R] under logits [R, V], and the `count` best of every row."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0].tolist()
    if not count:
        return [TokenLogprob(t, p) for t, p in zip(tokens, own, strict=True)]
    values, ids = log_p.topk(min(count, log_p.shape[1]), dim=-1)
    return [
        TokenLogprob(t, p, tuple(zip(i, v, strict=True)))
        for t, p, i, v in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]

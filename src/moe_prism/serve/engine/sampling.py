"""Drawing tokens: every request with its own temperature, nucleus and random numbers, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..requests import ErrorKind, Sampling, TokenLogprob
from .processors import processors


class Sampler:
    """One request's random numbers, and what it does to its logits before a token is drawn."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int] = (), stop_ids: frozenset[int] = frozenset(), grammar: Any = None
    ) -> None:
        """grammar: an xgrammar matcher, which is told of every token."""
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._tokens = list(prompt)
        self._grammar = grammar
        self._processors = processors(sampling, len(prompt), stop_ids, grammar)

    @property
    def shapes(self) -> bool:
        """Whether it changes logits at all."""
        return bool(self._processors)

    def shape(self, row: Tensor) -> Tensor:
        """Logits [V] as they are drawn from."""
        return self._processors(torch.tensor([self._tokens]), row[None].cpu())[0].to(row.device)  # type: ignore[no-any-return]

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def took(self, token: int) -> None:
        """The token was drawn."""
        if self._processors:
            self._tokens.append(token)
        if self._grammar is not None:
            self._grammar.accept_token(token)


class Guesser(Sampler):
    """Draws a request's next tokens with the random numbers that its sampler will use, and takes none from it.

    Penalties, biases and grammars are left out: a guess may be wrong.
    """

    def __init__(self, of: Sampler) -> None:
        own = of.sampling
        super().__init__(Sampling(own.temperature, own.top_p, 0, own.top_k, own.min_p))
        self.generator.set_state(of.generator.get_state())


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[ErrorKind | None]]:
    """Next token of every row of logits [R, V] (float32), and why a row gave none: NaN or infinity of the model's, or all ruled out."""
    best, token = logits.max(dim=-1)
    failed: list[ErrorKind | None] = [None if good else ErrorKind.NOT_FINITE for good in torch.isfinite(best).tolist()]
    tokens: list[int] = token.tolist()
    shaped = [i for i, s in enumerate(samplers) if s.shapes and not failed[i]]
    if shaped:
        logits = logits.clone()  # log-probabilities are the model's own
        for i in shaped:
            logits[i] = samplers[i].shape(logits[i])
            tokens[i] = int(logits[i].argmax())
            if not torch.isfinite(logits[i, tokens[i]]):
                failed[i] = ErrorKind.RULED_OUT
    hot = [i for i, s in enumerate(samplers) if s.sampling.temperature > 0 and not failed[i]]
    if hot:
        for i, drawn in zip(hot, _nucleus(logits[hot], [samplers[i] for i in hot]), strict=True):
            tokens[i] = drawn
    for i, sampler in enumerate(samplers):
        if not failed[i]:
            sampler.took(tokens[i])
    return tokens, failed


def _nucleus(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Inverse transform over the tokens from most to least likely, cut after top_k, where their sum passes top_p, and at min_p: the three
    of transformers, in its order. Each keeps the beginning of the sorted row.
    """
    asked = [s.sampling for s in samplers]
    temperature, top_p, min_p = (
        torch.tensor(values, dtype=torch.float64)[:, None]
        for values in zip(*((a.temperature, a.top_p, a.min_p) for a in asked), strict=True)
    )
    uniform = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64)[:, None]
    # a token may win by more than a float can hold at a temperature near 0
    scaled = (logits.double().cpu() - logits.double().cpu().max(dim=-1, keepdim=True).values) / temperature
    values, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    share = values.cumsum(-1)
    size = share.shape[1]
    last = torch.tensor([min(a.top_k, size) or size for a in asked])[:, None] - 1
    last = torch.minimum(last, torch.searchsorted(share, top_p * share.gather(1, last)))  # last token of the nucleus
    last = torch.minimum(last, (values >= min_p * values[:, :1]).sum(-1, keepdim=True) - 1)
    target = uniform * share.gather(1, last)
    position = torch.minimum(torch.searchsorted(share, target, right=True), last)
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

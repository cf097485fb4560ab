"""What a request's fields do to its logits before a token is drawn. transformers' own processors, and ours where it has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from ..requests import Sampling


def processors(sampling: Sampling, prompt: int, stop_ids: frozenset[int], grammar: Any) -> LogitsProcessorList:
    """In the order in which they act. prompt: tokens of it; grammar: an xgrammar matcher or None. Empty if nothing is asked."""
    made: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        made.append(CountPenalty(prompt, sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.bias:
        made.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in sampling.bias}))
    if sampling.min_tokens and stop_ids:
        made.append(MinNewTokensLengthLogitsProcessor(prompt, sampling.min_tokens, sorted(stop_ids)))
    if sampling.allowed:
        made.append(OnlyThese(sampling.allowed))
    if grammar is not None:
        made.append(Grammar(grammar))
    return LogitsProcessorList(made)


class CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's two penalties, on tokens that were generated: one for being there, one for every time."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [1, t], scores [1, V]."""
        count = torch.bincount(input_ids[0, self.prompt :], minlength=scores.shape[1])[None].to(scores.dtype)
        return scores - self.frequency * count - self.presence * (count > 0)


class OnlyThese(LogitsProcessor):  # type: ignore[misc]
    """No other token is drawn."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [1, t], scores [1, V]."""
        out = torch.full_like(scores, float("-inf"))
        out[:, self.tokens] = scores[:, self.tokens]
        return out


class Grammar(LogitsProcessor):  # type: ignore[misc]
    """Tokens that a grammar allows next. What it forbids has no chance, whatever the other fields say, so it comes last."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self._mask: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [1, t], scores [1, V]."""
        import xgrammar

        if self._mask is None:
            self._mask = xgrammar.allocate_token_bitmask(1, scores.shape[1])
        self.matcher.fill_next_token_bitmask(self._mask)
        out = scores.contiguous().clone()
        xgrammar.apply_token_bitmask_inplace(out, self._mask)
        return out

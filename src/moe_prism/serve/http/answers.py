"""OpenAI's answer objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..requests import TokenLogprob
from .strands import Scored, Strand
from .vocabulary import Vocabulary


def usage(strands: Sequence[Strand], prompts: int) -> dict[str, Any]:
    """prompts: tokens of the distinct prompts; n sequences of one prompt count it once."""
    generated = sum(s.generated for s in strands)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": generated,
        "total_tokens": prompts + generated,
        "prompt_tokens_details": {"cached_tokens": sum(s.request.cached_tokens for s in strands)},
    }


class Words:
    """Tokens in answers. hide: special ones do not show in the text, so they have a name and no bytes."""

    def __init__(self, vocabulary: Vocabulary, *, hide: bool) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special if hide else frozenset[int]()

    def name(self, token: int) -> str:
        return self._vocabulary.piece(token).name

    def data(self, token: int) -> list[int] | None:
        """Bytes of a token that might have come."""
        return None if token in self._hidden else list(self._vocabulary.piece(token).data) or None

    def completion(self, scored: Sequence[Scored], count: int) -> dict[str, Any]:
        """The legacy form: parallel lists. `bytes` is ours: those of all tokens join to the text."""
        return {
            "tokens": [self.name(s.entry.token) for s in scored],
            "token_logprobs": [s.entry.logprob for s in scored],
            "top_logprobs": [
                None if s.entry.logprob is None else {self.name(t): p for t, p in reversed(s.entry.top[:count])} for s in scored
            ],
            "text_offset": [s.step.offset for s in scored],
            "bytes": [list(s.step.data) or None for s in scored],
        }

    def chat(self, scored: Sequence[Scored], count: int) -> dict[str, Any]:
        """The form of chat answers: one entry per token."""
        content = [
            {
                "token": self.name(s.entry.token),
                "logprob": s.entry.logprob,
                "bytes": list(s.step.data) or None,
                "top_logprobs": [{"token": self.name(t), "logprob": p, "bytes": self.data(t)} for t, p in s.entry.top[:count]],
            }
            for s in scored
        ]
        return {"content": content, "refusal": None}

    def prompt(self, entries: Sequence[TokenLogprob], count: int) -> list[dict[int, dict[str, Any]] | None]:
        """vLLM's form of the prompt's log-probabilities: token id -> what is known; null for the first token, which nothing predicts."""
        return [None if e.logprob is None else self._known(e, count) for e in entries]

    def _known(self, entry: TokenLogprob, count: int) -> dict[int, dict[str, Any]]:
        top = {t: (p, rank + 1) for rank, (t, p) in enumerate(entry.top)}
        rows = {
            entry.token: (entry.logprob, top[entry.token][1] if entry.token in top else None),
            **dict(list(top.items())[:count]),
        }
        return {t: {"logprob": p, "rank": rank, "decoded_token": self.name(t)} for t, (p, rank) in rows.items()}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n".encode()

"""OpenAI's answer objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..requests import TokenLogprob
from .detokenize import token_text
from .service import Strand


def usage(strands: Sequence[Strand], prompts: int) -> dict[str, Any]:
    """prompts: tokens of the distinct prompts; n sequences of one prompt count it once."""
    generated = sum(s.generated for s in strands)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": generated,
        "total_tokens": prompts + generated,
        "prompt_tokens_details": {"cached_tokens": sum(s.request.cached_tokens for s in strands)},
    }


def completion_logprobs(tokenizer: Any, entries: Sequence[TokenLogprob], offset: int, count: int) -> dict[str, Any]:
    """The legacy form: parallel lists. offset: characters before the first token."""
    tokens = [token_text(tokenizer, e.token) for e in entries]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [e.logprob for e in entries],
        "top_logprobs": [
            None if e.logprob is None else {token_text(tokenizer, t): p for t, p in reversed(e.top[:count])} for e in entries
        ],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Any, entries: Sequence[TokenLogprob], count: int) -> dict[str, Any]:
    """The form of chat answers: one entry per token."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [{**entry(e.token, e.logprob), "top_logprobs": [entry(t, p) for t, p in e.top[:count]]} for e in entries],
        "refusal": None,
    }


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n".encode()

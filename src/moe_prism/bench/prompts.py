"""Prompts of real text in the lengths a workload asks for: cut from the held-out files of Python's standard library."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..data import read_documents, split_documents
from ..errors import UsageError
from ..schedule.workloads import Arrival

Prompt = str | list[int]
Cut = Callable[[int, random.Random], Prompt]  # tokens -> a prompt of that many


def cut_tokens(folder: str | Path) -> Cut:
    """Prompts as token ids, exact in length, by the tokenizer of a model folder."""
    from ..model import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except UsageError as error:
        raise UsageError(f"no tokenizer in '{folder}'", "give a folder with tokenizer.json") from error
    ids: list[int] = tokenizer(_text(), add_special_tokens=False, verbose=False)["input_ids"]

    def cut(tokens: int, rng: random.Random) -> Prompt:
        start = rng.randrange(max(1, len(ids) - tokens))
        return ids[start : start + tokens]

    return cut


def cut_characters(per_token: float) -> Cut:
    """Prompts as text, about right in length."""
    text = _text()

    def cut(tokens: int, rng: random.Random) -> Prompt:
        size = max(1, round(tokens * per_token))
        start = rng.randrange(max(1, len(text) - size))
        return text[start : start + size]

    return cut


def sample_text(characters: int) -> str:
    """The beginning of the text, to learn how many characters a server's tokens have."""
    return _text()[:characters]


def prompts(arrivals: Sequence[Arrival], cut: Cut, salt: str) -> list[Prompt]:
    """One for each arrival, at random places that depend on `salt` alone."""
    rng = random.Random(salt)  # noqa: S311 - places in a text
    return [cut(arrival.job.prompt, rng) for arrival in arrivals]


def fitted(arrivals: Sequence[Arrival], context: int | None) -> list[Arrival]:
    """With forced lengths, and none longer than the context: the output is cut to half of it, then the prompt to the rest."""
    room = context or 1 << 30
    out = []
    for arrival in arrivals:
        length = max(1, min(arrival.length, room // 2))
        prompt = min(arrival.job.prompt, max(1, room - length))
        out.append(Arrival(replace(arrival.job, prompt=prompt, output=length), length))
    return out


@cache
def _text() -> str:
    return "\n".join(d.text for d in split_documents(read_documents("stdlib"), "evaluation", source="stdlib"))

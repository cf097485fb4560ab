"""The past of requests whose keys and values lie in pages: the state after a token has the place of that token in the cache.

So it is there for whoever goes on behind that token: the next chunk of a prompt, or another request that begins alike. What is computed
again is counted again, at its new place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .bind import Step
from .control import Past, States, compiled


def keeps_every_token(model: Any) -> bool:
    """Whether some layer's cache has a place for every token of a request: where all look through a window, places are used again."""
    config = model.config.get_text_config()
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is None or "full_attention" in (types or ())


class RequestSpan(NamedTuple):
    """A request's part of a step: `tokens` rows behind `before` tokens in the cache, whose pages are `blocks`."""

    before: int
    tokens: int
    blocks: Sequence[int]


class PagedStates:
    """States beside a paged cache. page: tokens of a block; layers: MoE layers of the model."""

    def __init__(self, page: int, layers: int) -> None:
        self.page = page
        self.states = States(0, layers)

    def past(self, step: Step, spans: Sequence[RequestSpan]) -> Past:
        """Of the rows of a step, in the order of spans."""
        page, before, after = self.page, [], []
        for first, count, blocks in spans:
            places = [-1 if at < 0 else int(blocks[at // page]) * page + at % page for at in range(first - 1, first + count)]
            before += places[:-1]
            after += places[1:]
        most = max(after, default=0) + 1
        if most > len(self.states.tokens):
            self.states.grow(max(most, 2 * len(self.states.tokens)))
        rows = np.array([before, after, step.kinds(len(after))], np.int64)
        compiled().carry(rows, self.states.sums, self.states.tokens)
        self.states.begin(rows)
        return Past.of(rows, self.states, step.bound.holds_several)

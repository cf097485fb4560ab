"""What a step that a policy plans comes to, in the sums that a cost model prices."""

from __future__ import annotations

from collections.abc import Iterable

from ..forecast.step_cost import LayerFacts, Totals, chunk_pairs
from .base import Ladder, Progress, Work


def step_totals(facts: LayerFacts, work: Iterable[tuple[Progress, Work]], ladder: Ladder) -> Totals:
    """The sums of a step, each part at its own level."""
    slots = [level.slots for level in ladder.levels]
    unread = [facts.unread(k) for k in slots]
    sums = [0.0] * 7
    for progress, part in work:
        phase = 1 if progress.remaining_prompt <= 0 else 0
        pairs = progress.context if phase else chunk_pairs(part.tokens, progress.computed)
        sums[phase] += part.tokens
        sums[2 + phase] += part.tokens * slots[part.level]
        sums[4 + phase] += pairs
        sums[6] += part.tokens * unread[part.level]
    return Totals(*sums)

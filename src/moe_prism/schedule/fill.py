"""What the batch policies share: taking requests in an order until a limit is met, and one level for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..forecast.step_cost import CostModel
from .base import Job, Ladder, Limits, Progress, Work
from .totals import step_totals

Picks = list[tuple[Progress, int]]  # who takes part in the step, with how many tokens


def ceiling(job: Job, ladder: Ladder) -> int:
    """The highest level this job may be served at."""
    return ladder.top if job.ceiling < 0 else min(job.ceiling, ladder.top)


def is_decode(progress: Progress) -> bool:
    """Whether a request has its whole prompt in the cache."""
    return progress.computed >= progress.job.prompt


class Filler:
    """Fills one step. A request that is admitted is promised cache for its prompt and all of its output."""

    def __init__(self, running: Sequence[Progress], limits: Limits) -> None:
        self.picks: Picks = []
        self.tokens = limits.tokens
        self.places = limits.requests - len(running)
        self.cache = limits.free_cache

    def run(self, running: Iterable[Progress]) -> None:
        """Everything that runs: decodes first, then prompts in the order of admission."""
        prompts: list[Progress] = []
        for progress in running:
            if not is_decode(progress):
                prompts.append(progress)
            elif self.tokens > 0:
                self.picks.append((progress, 1))
                self.tokens -= 1
        for progress in prompts:
            self._prefill(progress)

    def admit(self, progress: Progress) -> bool:
        """Take a waiting request, or a part of its prompt; False if it does not fit now."""
        promised = progress.job.prompt + progress.job.output
        if self.places < 1 or self.tokens < 1 or promised > self.cache:
            return False
        self.places -= 1
        self.cache -= promised
        self._prefill(progress)
        return True

    def _prefill(self, progress: Progress) -> None:
        tokens = min(progress.remaining_prompt, self.tokens)
        if tokens > 0:
            self.picks.append((progress, tokens))
            self.tokens -= tokens


def top_floor(picks: Picks) -> int:
    """The lowest level that is allowed for all: the batch K of the paper's baselines."""
    return max((progress.job.floor for progress, _ in picks), default=0)


def at_level(picks: Picks, level: int, ladder: Ladder) -> list[Work]:
    """Everyone at one level, except those whose ceiling is below it."""
    return [Work(progress.job.id, tokens, min(level, ceiling(progress.job, ladder))) for progress, tokens in picks]


def cheapest(picks: Picks, ladder: Ladder, cost: CostModel) -> list[Work]:
    """The mixed batch, everyone at the own floor, if it is predicted to be faster than one level for all."""
    uniform = at_level(picks, top_floor(picks), ladder)
    mixed = [Work(progress.job.id, tokens, progress.job.floor) for progress, tokens in picks]
    return min((uniform, mixed), key=lambda works: price(picks, works, ladder, cost))


def price(picks: Picks, works: Sequence[Work], ladder: Ladder, cost: CostModel) -> float:
    """Predicted seconds of a step."""
    return cost.seconds(
        step_totals(cost.facts, ((progress, work) for (progress, _), work in zip(picks, works, strict=True)), ladder)
    )

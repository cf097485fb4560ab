"""Self-draft: the model at a low budget drafts tokens, the model at its own point checks them together.

Both share one cache: a drafted token sees exact keys and values of all that is certain, its own are written over by the check. A token is
drawn where plain decoding would draw it, from the same logits and with the same random number, and the draft stands while it agrees. So
the answer is the one of plain decoding, greedy or drawn. How long the draft is follows from what it gains here (`pace`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...elastic.bind import Step
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import OperatingPoint
from .base import Decoded, DecodeMethod, DecodeRun, Steps, at_budget, refuse_held
from .pace import Pace
from .sequence import Sequence

LONGEST = 16


@dataclass(frozen=True, kw_only=True)
class SelfDraftParameters:
    """budget: share of a token's expert bytes that the draft reads. length: tokens of the longest draft. adapt: measure, and draft as many
    as pay, none where none do; false: always the longest.
    """

    budget: float = 0.25
    length: int = 4
    adapt: bool = True


class SelfDraft(DecodeMethod):
    """`self-draft:BUDGET`, `self-draft:budget=0.25:length=4:adapt=true`."""

    needs = ()
    neutral: ClassVar[Mapping[str, Any]] = {"budget": 0.5}  # any budget is
    served_by = "generate, serve --self-draft"
    Parameters = SelfDraftParameters
    parameters: SelfDraftParameters

    def __init__(self, name: str, parameters: SelfDraftParameters) -> None:
        super().__init__(name, parameters)
        if not 0 < parameters.budget <= 1:
            raise UsageError(f"the budget {parameters.budget:g} of a draft is outside (0, 1]", "write such as self-draft:0.25")
        if not 0 <= parameters.length <= LONGEST:
            raise UsageError(f"a draft of {parameters.length} tokens", f"give 0 to {LONGEST}; 0 drafts nothing")

    @classmethod
    def example(cls) -> str | None:
        return "0.5"

    def check(self, elastic: Elastic, point: OperatingPoint) -> None:
        refuse_held(elastic, point, "self-draft")

    def steps(self, request: DecodeRun) -> Steps:
        asked = self.parameters
        own = request.step()
        cheap = request.step(at_budget(request.elastic, request.point, asked.budget))
        pace, sequence = Pace(asked.length), request.sequence()
        drafted = kept = rounds = tried = 0
        request.take(sequence, sequence.forward(own)[-1])
        over = request.is_over(sequence.ids)
        while not over:
            yield
            wanted = 0 if asked.length == 0 else pace.choose() if asked.adapt else asked.length
            began = time.perf_counter()
            guesses = draft(request, sequence, cheap, wanted)
            checked = time.perf_counter()
            agreed, asked_for, over = _check(request, sequence, own, guesses)
            done = time.perf_counter()
            sequence.take_back(len(sequence.ids) - 1)
            if wanted:
                rounds, drafted, kept, tried = rounds + 1, drafted + wanted, kept + agreed, tried + asked_for
                pace.drafted((checked - began) / wanted)
                pace.checked(wanted, done - checked)
                pace.outcome(wanted, agreed)
            else:
                pace.plain(done - began)
        facts = {"rounds": rounds, "drafted": drafted, "tried": tried, "kept": kept, "forwards": request.spent.forwards}
        return Decoded(sequence.ids, facts)


def draft(request: DecodeRun, sequence: Sequence, cheap: Step, count: int) -> list[int]:
    """The next tokens at the low budget; the sequence is as it was then, and so are the random numbers.

    A guess is drawn with the numbers that the check will draw with. torch takes the token whose probability is largest beside its own
    noise, so two similar distributions mostly give the same token.
    """
    certain, cached = list(sequence.ids), sequence.cached
    device = sequence.model.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], enabled=request.samples):
        for _ in range(count):
            sequence.ids.append(request.draw(sequence.ids, sequence.forward(cheap)[-1]))
    guesses, sequence.ids = sequence.ids[len(certain) :], certain
    sequence.take_back(cached)
    return guesses


def _check(request: DecodeRun, sequence: Sequence, own: Step, guesses: list[int]) -> tuple[int, int, bool]:
    """(guesses that agreed, guesses that were looked at, whether the answer is over): its tokens, and the one behind them, are at the
    sequence's end.
    """
    certain = len(sequence.ids)
    sequence.ids += guesses
    rows = sequence.forward(own, len(guesses) + 1)
    del sequence.ids[certain:]
    agreed, over = 0, False
    for i, logits in enumerate(rows):
        right = request.take(sequence, logits) in guesses[i : i + 1]
        agreed, over = agreed + right, request.is_over(sequence.ids)
        if over or not right:
            break
    return agreed, min(len(sequence.ids) - certain, len(guesses)), over

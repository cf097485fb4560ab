"""Self-draft in the engine: requests at the full model guess tokens at a low budget, and the full model checks them together.

A guess is a step of one token at the draft's point; a check is a step of all guesses and the token before them, as if they were a chunk of
a prompt. Both stand in the same batch as whatever else runs. What a draft writes into the cache the check writes over. See
`methods.decode.self_draft`, which does the same for one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.generation.continuous_batching.requests import RequestState

from ...elastic.runtime import Elastic
from ...methods.decode.base import at_budget
from ...methods.decode.pace import Pace
from ...methods.decode.self_draft import SelfDraftParameters
from ...point import FULL, OperatingPoint
from ..requests import Request
from .sampling import Guesser


@dataclass
class Draft:
    """Guesses of one request. base: its tokens in the cache before; last: the certain token that is not; wanted: guesses to make."""

    base: int
    last: int
    wanted: int
    guesses: list[int] = field(default_factory=list)
    guesser: Guesser | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it is to be checked."""
        return len(self.guesses) == self.wanted


class Drafts:
    """All drafts of an engine. drafted, kept: tokens so far."""

    def __init__(self, elastic: Elastic, asked: SelfDraftParameters) -> None:
        self.asked = asked
        self.point: OperatingPoint = at_budget(elastic, FULL, asked.budget)
        self.open: dict[str, Draft] = {}
        self.drafted = self.kept = 0
        self._paces: dict[int, Pace] = {}

    def pace(self, requests: int) -> Pace:
        """What drafting gains with about so many requests together."""
        return self._paces.setdefault(requests.bit_length(), Pace(self.asked.length))

    def turn(self, request: Request, state: RequestState, *, may: bool, room: int, together: int) -> Draft | None:
        """The draft that a request which decodes works on in this step, and the tokens of that; None: a plain step.

        may: whether the step is at the full model; room: tokens that the step still takes; together: requests that decode.
        """
        draft = self.open.get(request.job.id)
        may = may and request.sampling.self_draft and room > (0 if draft is None else draft.wanted)
        if not may:
            self.give_up(request.job.id, state)
            return None
        if draft is None:
            left = request.job.output - state.generated_len() - 1
            wanted = min(self.pace(together).choose() if self.asked.adapt else self.asked.length, left, room - 1)
            if wanted < 1:
                return None
            draft = self.open[request.job.id] = Draft(state.position_offset, state.tokens_to_process[0], wanted)
        if draft.is_ready:
            state.position_offset, state.tokens_to_process = draft.base, [draft.last, *draft.guesses]
        return draft

    def give_up(self, request_id: str, state: RequestState) -> None:
        """Forget a draft, as if it had not been."""
        draft = self.open.pop(request_id, None)
        if draft is not None:
            state.position_offset, state.tokens_to_process = draft.base, [draft.last]

    def settled(self, request_id: str, state: RequestState, tokens: list[int]) -> None:
        """A check drew these tokens, the guesses that were right and one more: all but the last are in the cache."""
        draft = self.open.pop(request_id)
        state.position_offset = draft.base + len(tokens)
        state.generated_tokens.extend(tokens[:-1])
        self.drafted += draft.wanted
        self.kept += len(tokens) - 1

    def observe(self, parts: Sequence[tuple[Draft | None, bool, int]], seconds: float) -> None:
        """A step took so long. parts: draft, whether it is a prompt, tokens drawn, of each. Only steps of one kind say anything."""
        drafts = [draft for draft, _, _ in parts]
        pace = self.pace(len(parts))
        for draft, _, drawn in parts:
            if draft is not None and drawn:
                pace.outcome(draft.wanted, drawn - 1)
        if any(is_prompt for _, is_prompt, _ in parts):
            return
        if all(draft is None for draft in drafts):
            pace.plain(seconds)
        elif all(draft is not None and not drawn for draft, _, drawn in parts):
            pace.drafted(seconds)
        elif all(draft is not None and drawn for draft, _, drawn in parts):
            pace.checked(max(draft.wanted for draft in drafts if draft is not None), seconds)

    def forget(self, book: dict[str, Request]) -> None:
        """Drafts of requests that have left."""
        for request_id in [i for i in self.open if i not in book]:
            del self.open[request_id]

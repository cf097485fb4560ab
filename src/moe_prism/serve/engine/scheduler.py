"""The bridge between a policy and transformers' continuous batching: who runs in the next step, and at which level."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from ...elastic.adapters import of_tokens
from ...elastic.bind import Step, bind
from ...elastic.paged_past import PagedStates, RequestSpan
from ...elastic.runtime import Elastic
from ...forecast.step_cost import LayerFacts, Totals, chunk_pairs
from ...schedule.base import Ladder, Limits, Policy, Work
from ..backend import Tally
from ..requests import Request
from .adapting import Adapting
from .drafting import Draft, Drafts
from .paged_attention import PagedLayout, Segment, plan

NAME = "moe_prism"


@dataclass
class StepPart:
    """One request's share of the step being computed."""

    request: Request
    state: RequestState
    start: int  # first row in the packed batch
    tokens: int
    level: int
    is_prompt: bool
    yields: int  # tokens that are drawn after it; of a check, the runner says how many
    draft: Draft | None = None  # whose guesses it makes or checks

    @property
    def guesses(self) -> bool:
        """Whether it makes a guess, at the draft's point."""
        return self.draft is not None and not self.yields

    @property
    def lasting(self) -> int:
        """Tokens whose keys and values stay: of a guess none, of a check those of what was right."""
        return self.tokens if self.draft is None else self.yields


@dataclass
class PackedStep:
    """What one step computes, in the order of the packed batch."""

    parts: list[StepPart] = field(default_factory=list)
    began: float = 0.0  # when the policy was asked
    asked: float = 0.0  # seconds the policy took
    totals: Totals = field(default_factory=Totals)  # what a cost model prices

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def tally(self, seconds: float) -> Tally:
        """The step in numbers, once it took `seconds`."""
        levels: dict[int, int] = {}
        prompt = generated = 0
        for part in self.parts:
            levels[part.level] = levels.get(part.level, 0) + part.lasting
            prompt += part.tokens if part.is_prompt else 0
            generated += part.yields
        return Tally(seconds, self.asked, levels, prompt, generated)

    def told(self) -> tuple[tuple[str, int, int, int], ...]:
        """Request, level, tokens computed, tokens found in the prefix cache, of each part."""
        return tuple((p.request.job.id, p.level, p.lasting, p.request.cached_tokens) for p in self.parts)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """What a scheduler works with. book: requests by id, kept by the engine; paged: our CPU attention runs, and wants a PagedLayout.

    drafts: of requests that draft for themselves; None: nobody may.
    """

    policy: Policy
    ladder: Ladder
    elastic: Elastic
    book: dict[str, Request]
    clock: Callable[[], float]
    facts: LayerFacts
    paged: bool
    adapting: Adapting
    vocabulary: int
    drafts: Drafts | None = None


class PolicyScheduler(Scheduler):  # type: ignore[misc]
    """Asks `Policy.step` what to run. `connect` must be called once before the first step."""

    def connect(self, to: Connection) -> None:
        """Must be called once before the first step. What the points need of the model stays installed for as long as the engine runs."""
        self.policy, self.ladder, self.elastic, self.book, self.clock = to.policy, to.ladder, to.elastic, to.book, to.clock
        self.paged, self.vocabulary, self.drafts, self.adapting = to.paged, to.vocabulary, to.drafts, to.adapting
        points, self.slots = [level.point for level in self.ladder.levels], [level.slots for level in self.ladder.levels]
        if to.drafts is not None:  # one more point behind the levels, which no request can ask for
            points.append(to.drafts.point)
            self.slots.append(self.slots[-1] * to.drafts.asked.budget)
        self.unread = [to.facts.unread(slots) for slots in self.slots]
        self.bound = bind(self.elastic, points)
        self.installed = ExitStack()
        self.installed.enter_context(self.elastic.at(self.bound))
        self.current = PackedStep()
        self.states = PagedStates(self._of_every_token.tokens_per_page, len(self.elastic.layers))
        self.capacity = self.cache.num_blocks * self._allocator.tokens_per_page

    @property
    def _allocator(self) -> Any:
        return next(iter(self.cache.cache_allocators.values()))

    @property
    def _of_every_token(self) -> Any:
        """The allocator of layers that see every token, so that each keeps its place; the engine refuses what needs one without it."""
        allocators = self.cache.cache_allocators.values()
        return next((a for a in allocators if not hasattr(a, "sliding_window")), self._allocator)

    def promised(self, request: Request) -> int:
        """Cache tokens a request may need in all, whole blocks."""
        page = self._allocator.tokens_per_page
        return -(-(request.job.prompt + request.job.output) // page) * page  # type: ignore[no-any-return]

    def limits(self, token_budget: int) -> Limits:
        promised = sum(self.promised(self.book[i]) for i in self.active_requests if i in self.book)
        return Limits(self.max_requests_per_batch, token_budget, self.capacity - promised)

    def clear_cancelled_requests(self) -> list[RequestState]:
        """Also out of the book. A request may be cancelled before it has arrived here: that is remembered."""
        with self._cancellation_lock:
            wanted = set(self._requests_to_cancel)
        states: list[RequestState] = super().clear_cancelled_requests()
        for state in states:
            self.book.pop(state.request_id, None)
        with self._cancellation_lock:
            self._requests_to_cancel |= {i for i in wanted if i in self.book}
        return states

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[FutureRequestState], bool, int, int]:
        limits = self.limits(token_budget)
        waiting = [self.book[i].track for i in self.waiting_requests_order]
        running = [self.book[i].track for i in self.active_requests]
        now = self.clock()
        self.current = PackedStep(began=now)
        works = self.policy.step(now, waiting, running, limits)
        self.current.asked = self.clock() - now
        scheduled: list[FutureRequestState] = []
        admitted: set[str] = set()
        left, read = limits, 0
        for work in works:
            part = self._part(work, left, admitted)
            if part is None:
                continue
            left = Limits(left.requests, left.tokens - part.tokens, left.free_cache)
            read += part.state.current_len()
            self.current.parts.append(part)
            scheduled.append(FutureRequestState(part.state, part.yields > 0, {}, part.tokens))
        self._cleanup_waiting_queue(admitted)
        if scheduled:
            self._set_levels()
            self.current.totals = self._totals()
            if self.paged:
                self.cache.moe_prism_layout = self._layout()
        # our attention reads the cache through its own index: 0 keeps the engine from listing every context token
        return scheduled, False, self.current.tokens, 0 if self.paged else read

    def _part(self, work: Work, limits: Limits, admitted: set[str]) -> StepPart | None:
        """Put one request's work into the step; None if it cannot run now."""
        request = self.book.get(work.id)
        state = self.active_requests.get(work.id) or self.waiting_requests.get(work.id)
        if request is None or state is None:
            return None
        job = request.job
        level = min(max(work.level, job.floor), job.ceiling if job.ceiling >= 0 else self.ladder.top)
        is_prompt = state.status != RequestStatus.DECODING
        if state.status == RequestStatus.PENDING:
            if len(self.active_requests) >= limits.requests or self.promised(request) > self.limits(0).free_cache:
                return None
            self._reuse_prefix(request, state, level)
        draft = None if is_prompt or self.drafts is None else self._draft(request, state, level, limits)
        checks = draft is not None and draft.is_ready
        tokens = state.remaining_prefill_tokens if is_prompt else state.tokens_to_process
        count = min(len(tokens), work.tokens, limits.tokens) if is_prompt else len(tokens)
        if count < 1 or limits.tokens < 1 or not self._store(state, count):
            return None
        self._schedule_request(state, tokens, count, admitted)
        if self.waiting_requests.pop(work.id, None) is not None:
            admitted.add(work.id)
        yields = int(not state.remaining_prefill_tokens and (draft is None or checks))
        return StepPart(request, state, self.current.tokens, count, level, is_prompt, yields, draft)

    def _draft(self, request: Request, state: RequestState, level: int, limits: Limits) -> Draft | None:
        """The draft that a request which decodes works on in this step."""
        assert self.drafts is not None
        return self.drafts.turn(
            request, state, may=level == self.ladder.top, room=limits.tokens, together=len(self.active_requests)
        )

    def _point(self, part: StepPart) -> int:
        """Which of the bound points a part runs at."""
        return len(self.ladder.levels) if part.guesses else part.level

    def _store(self, state: RequestState, tokens: int) -> bool:
        """Allocate cache for new tokens, giving up blocks kept only for their prefix if need be."""
        if self.cache.can_store_request_tokens(state, tokens):
            return True
        if not self.cache.evict_cached_blocks():
            return False
        self.cache.pool.try_to_free_sectors()
        return bool(self.cache.can_store_request_tokens(state, tokens))

    def _set_levels(self) -> None:
        """The operating point of every token of the packed batch; one number where they agree, so that the full model runs undivided."""
        parts = self.current.parts
        levels = [self._point(part) for part in parts]
        if len(set(levels)) == 1:
            which: int | torch.Tensor = levels[0]
        else:
            which = torch.tensor(levels).repeat_interleave(torch.tensor([part.tokens for part in parts]))
        step = Step(self.bound, which)
        if self.adapting.loaded:
            step.adapter = of_tokens(self.adapting.loaded, [(part.request.adapter, part.tokens) for part in parts])
        if self.bound.follows:
            table = self._of_every_token.block_table
            spans = [RequestSpan(part.state.position_offset, part.tokens, table[part.state.request_id]) for part in parts]
            step.past = self.states.past(step, spans)
        self.elastic.step = step

    def _totals(self) -> Totals:
        sums = [0.0] * 7
        for part in self.current.parts:
            phase, past = (0 if part.is_prompt else 1), part.state.position_offset
            sums[phase] += part.tokens
            sums[2 + phase] += part.tokens * self.slots[self._point(part)]
            sums[4 + phase] += chunk_pairs(part.tokens, past)
            sums[6] += part.tokens * self.unread[self._point(part)]
        return Totals(*sums)

    def _layout(self) -> PagedLayout:
        allocator = self._allocator
        segments = [
            Segment(p.start, p.tokens, p.state.position_offset, allocator.block_table[p.state.request_id])
            for p in self.current.parts
        ]
        return plan(segments, allocator.tokens_per_page, allocator.block_physical_stride)

    # Prefix cache. The engine's key is the tokens of a block and of all before it. Ours must also say at which level they were
    # computed, so token t at level l is written as t + l * vocabulary.

    def _reuse_prefix(self, request: Request, state: RequestState, level: int) -> None:
        if not self.cache.use_prefix_sharing or request.sampling.prompt_logprobs is not None:
            return
        salted = self._salted(request, [t + level * self.vocabulary for t in state.remaining_prefill_tokens])
        found = self.cache.search_prefix_match(state.request_id, salted)
        if found:
            self.active_requests[state.request_id] = state
            state.status = RequestStatus.PREFILLING
            state.remaining_prefill_tokens = state.remaining_prefill_tokens[found:]
            state.position_offset += found
            request.track.advance(computed=request.track.computed + found)
            request.cached_tokens = found
            request.computed_at.extend([level] * found)

    def _salted(self, request: Request, tokens: list[int]) -> list[int]:
        return with_salt(request.salt, tokens, self.adapting.digest(request.adapter))

    def remember_prefix(self, part: StepPart) -> None:
        """Offer the blocks a finished forward filled to later requests."""
        if not self.cache.use_prefix_sharing:
            return
        state, page = part.state, self._allocator.tokens_per_page
        part.request.computed_at.extend([part.level] * part.lasting)
        filled = state.position_offset // page - (state.position_offset - part.lasting) // page
        if filled:
            tokens = [*state.initial_tokens, *state.generated_tokens]
            at_levels = [t + at * self.vocabulary for t, at in zip(tokens, part.request.computed_at, strict=False)]
            salted = self._salted(part.request, at_levels)
            self._allocator.mark_complete_blocks(state.request_id, salted, filled)


def with_salt(salt: str, tokens: list[int], adapter: str = "") -> list[int]:
    """Tokens as they are hashed for a request of this salt: whoever does not know it finds nothing. The engine hashes 32-bit numbers, of
    which one would hold too little, so every place of a block has another share of the salt. adapter: the digest of its fine-tune, whose
    prefixes no other model's requests find, whatever their salt is.
    """
    if not salt and not adapter:
        return tokens
    own = hmac.digest(adapter.encode(), salt.encode(), "sha256") if adapter else hashlib.sha256(salt.encode()).digest()
    masks = [mask & 0x7FFF_FFFF for mask in struct.unpack("!8I", own)]
    return [token ^ masks[i % len(masks)] for i, token in enumerate(tokens)]


SCHEDULER_MAPPING[NAME] = PolicyScheduler

"""The model in a thread of its own: requests in, events out."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from ...adapters.table import BASE
from ...elastic.adapters import Adapters
from ...elastic.runtime import Elastic, experts_per_token
from ...errors import PrismError, UsageError
from ...forecast.step_cost import LayerFacts
from ...methods.decode.self_draft import SelfDraftParameters
from ...model import end_tokens
from ...schedule.base import Ladder, Policy
from ..backend import AdapterFacts, ExpertReads, Gauges, Ran, State
from ..requests import ErrorKind, Event, Request
from .adapting import Adapting, told_of
from .attends import context_limit, full_attention
from .deadlines import Deadlines
from .decoding import DecodingOffer, Decodings, DecodingSetup
from .drafting import Drafts
from .earlier import earlier_tokens
from .grammars import Grammars
from .manager import Manager, Nowhere
from .paged_attention import NAME as PAGED
from .runner import Runner
from .scheduler import NAME as SCHEDULER
from .scheduler import Connection, PackedStep, PolicyScheduler
from .size import EngineSize
from .widths import writes_latents

logger = logging.getLogger(__name__)
# transformers logs the first tokens of a prompt it drops, which nobody may read in a log
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)

IDLE = 0.05  # seconds between looks at an empty queue
FAILURES = 5  # steps that may fail one after the other before the engine gives up


Observer = Callable[[Ran, float], None]
"""Called in the engine's thread after every step with the step and its seconds."""


class Engine:
    """Runs requests until `stop`. `submit` and `cancel` may be called from any thread; sinks are called in the engine's."""

    def __init__(
        self,
        model: Any,
        ladder: Ladder,
        policy: Policy,
        size: EngineSize | None = None,
        clock: Callable[[], float] = time.monotonic,
        tokenizer: Any = None,
        drafting: SelfDraftParameters | None = None,
        adapters: Adapters | None = None,
        decoding: DecodingOffer | None = None,
    ) -> None:
        """tokenizer: says more end tokens, and is needed for answers that must have a form. drafting: how those draft that ask.

        adapters: of the model, if it has room. decoding: the methods that requests may ask for.
        """
        elastic = getattr(model, "_moe_prism", None)
        if elastic is None:
            raise UsageError("the model is not elastic", "load a folder written by `moe-prism refactor`")
        self.model, self.elastic, self.ladder, self.policy, self.clock = model, elastic, ladder, policy, clock
        self.size = size or EngineSize()
        self.observer: Observer | None = None
        self.drafts = None if drafting is None else Drafts(elastic, drafting)
        self.context = min(context_limit(model) or self.size.cache_tokens, self.size.cache_tokens)
        self.eos = end_tokens(model, tokenizer)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.grammars = Grammars(tokenizer, self.vocabulary, self.eos)
        self.book: dict[str, Request] = {}
        self.adapting = Adapting(adapters, self.book, lambda: self.manager._wake_up_loop.set())
        self.failed_steps = 0
        self.last_turn = clock()
        self._in_a_row, self._stopping = 0, False
        self._scheduler: PolicyScheduler | None = None
        self._deadlines, self._lock = Deadlines(self.book), threading.Lock()
        whole = full_attention(model) and not writes_latents(model)
        self._paged = model.device.type == "cpu" and model.dtype == torch.float32 and whole
        self._earlier = earlier_tokens(model, self._paged)
        self._attention = model.config._attn_implementation
        self.decodings = self._decodings(decoding or DecodingOffer(()), tokenizer, adapters)
        if self._paged:
            model.config._attn_implementation = PAGED  # `set_attn_implementation` would look for a flash package
        self.manager = Manager(
            model, GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1), self.size.batching(SCHEDULER)
        )
        self.manager.engine = self
        self.manager.output_router = Nowhere()

    def _decodings(self, served: DecodingOffer, tokenizer: Any, adapters: Adapters | None) -> Decodings:
        setup = DecodingSetup(
            model=self.model,
            elastic=self.elastic,
            ladder=self.ladder,
            tokenizer=tokenizer,
            attention=self._attention,
            numbers=lambda name: BASE if adapters is None else adapters.number(name),
            served=served,
            most=self.size.decoding,
            tokens=self.size.cache_tokens,
            chunk=self.size.step_tokens,
        )
        return Decodings(setup, self.book)

    # ---- any thread

    def start(self) -> None:
        self.manager.start()

    def stop(self, timeout: float | None = 10.0) -> None:
        """End the thread; what is unfinished gets an error."""
        self._stopping = True
        self.manager.stop(block=True, timeout=timeout, hard_stop=True)
        self.decodings.clear()
        for request in list(self.book.values()):
            self._finish(request, Event(error="the server stopped"))
        if self._paged:
            self.model.config._attn_implementation = self._attention

    async def attach(self) -> None:
        """Nothing to do: this engine needs no event loop."""

    async def detach(self) -> None:
        """Nothing to do."""

    @property
    def alive(self) -> bool:
        return bool(self.manager.is_running())

    @property
    def state(self) -> State:
        """A thread is not started again."""
        return "ready" if self.alive else "stopped"

    def give_up(self, seconds: float) -> None:
        """Nothing: a thread cannot be ended from outside."""

    def ended(self) -> str | None:
        """Why it stopped though nobody asked it to."""
        return None if self.alive or self._stopping else "the engine stopped"

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def policy_name(self) -> str:
        """As it is registered."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self.policy).__name__.removesuffix("Policy")).lower()

    def gauges(self) -> Gauges:
        """How things stand between two steps."""
        processor = self.manager.batch_processor
        store = getattr(self.elastic, "store", None)
        reads = None if store is None else ExpertReads(*store.figures())
        if processor is None:
            return Gauges(failed_steps=self.failed_steps, reads=reads)
        scheduler = processor.scheduler
        used = 1.0 - float(processor.cache.compute_free_capacity())
        drafts = () if self.drafts is None else (self.drafts.drafted, self.drafts.kept)
        running = len(scheduler.active_requests) + len(self.decodings.running)
        waiting = len(scheduler.waiting_requests) + len(self.decodings) - len(self.decodings.running)
        return Gauges(running, waiting, used, self.failed_steps, 0, *drafts)._replace(reads=reads)

    @property
    def adapters(self) -> Mapping[str, AdapterFacts]:
        return self.adapting.facts

    async def load_adapter(self, name: str, folder: str) -> None:
        """As `Backend` says. Not on the engine's thread."""
        await told_of(lambda told: self.adapting.load(name, folder, told))

    async def unload_adapter(self, name: str) -> None:
        """As `Backend` says. Not on the engine's thread."""
        await told_of(lambda told: self.adapting.unload(name, told))

    def submit(self, request: Request) -> None:
        """Queue a request. Its sink gets every event, the last one with `finish` or `error`. PrismError if the engine has stopped,
        UsageError for what it cannot do.
        """
        if not self.alive:
            raise PrismError("the engine has stopped", "restart the server; the log says why")
        if request.sampling.grammar:
            request.matcher = self.grammars.matcher(request.sampling.grammar)
        with self._lock, self.adapting.lock:
            if request.job.id in self.book:
                raise UsageError(f"request id '{request.job.id}' is in use", "choose another")
            self.adapting.check(request.adapter)
            self.book[request.job.id] = request
        if request.deadline is not None:
            self._deadlines.add(request.deadline, request.job.id)
        if request.sampling.is_beside:
            self._beside(request)
            return
        state = RequestState(
            request_id=request.job.id,
            initial_tokens=list(request.tokens),
            max_new_tokens=request.job.output,
            eos_token_id=list(request.stop_ids),
        )
        self.manager.input_queue.put(state)
        self.manager._wake_up_loop.set()

    def _beside(self, request: Request) -> None:
        try:
            self.decodings.add(request)
        except UsageError:
            self.book.pop(request.job.id, None)
            raise
        self.manager._wake_up_loop.set()

    def replace_policy(self, policy: Policy) -> None:
        """Another policy from the next step on."""
        self.policy = policy
        if self._scheduler is not None:
            self._scheduler.policy = policy

    def cancel(self, request_id: str) -> None:
        """Drop a request; it leaves the batch before the next step and its sink is not called again."""
        request = self.book.get(request_id)
        if request is not None:
            request.cancelled = True
            self.manager.cancel_request(request_id)

    def check_integrity(self) -> list[str]:
        """What is held though no request needs it; empty when all is well. Call while idle."""
        processor = self.manager.batch_processor
        if processor is None:
            return []
        scheduler = processor.scheduler
        tables = {name: len(a.block_table) for name, a in processor.cache.cache_allocators.items()}
        held = {
            "book": len(self.book),
            "active": len(scheduler.active_requests),
            "beside the batch": len(self.decodings),
            "waiting": len(scheduler.waiting_requests),
            "samplers": len(processor.model_runner.samplers),
            "results": processor.output_router.output_queue.qsize(),
            **{f"block tables of {name}": count for name, count in tables.items()},
        }
        return [f"{count} {what}" for what, count in held.items() if count]

    # ---- the engine's thread

    def connect(self, processor: ContinuousBatchProcessor) -> None:
        """Give the scheduler of a new batch processor what it works with."""
        scheduler: PolicyScheduler = processor.scheduler
        scheduler.connect(
            Connection(
                policy=self.policy,
                ladder=self.ladder,
                elastic=self.elastic,
                book=self.book,
                clock=self.clock,
                facts=layer_facts(self.elastic),
                paged=self._paged,
                adapting=self.adapting,
                vocabulary=self.vocabulary,
                drafts=self.drafts,
            )
        )
        self._scheduler = scheduler
        scheduler.policy = self.policy  # again: another thread may have replaced it before it could find the scheduler
        processor.model_runner = Runner.over(processor, self._earlier)

    def turn(self, processor: ContinuousBatchProcessor) -> bool:
        """One pass of the loop: a step if there is one. False ends the thread."""
        status = self.manager.background_thread_status
        self.last_turn = self.clock()
        self._expire(processor)
        self.adapting.turn()
        is_busy = self._turn_beside()
        try:
            if not processor.prepare_next_batch():
                if status.tp_status == status.HARD_STOP:
                    return False
                self._forget(processor.model_runner)
                if not is_busy:
                    self._wait()
                return True
            self.manager._generation_step()
            self._publish(processor)
            processor.update_batch()
            self._settle(processor)
            self._in_a_row = 0
        except Exception as error:
            self.failed_steps += 1
            self._in_a_row += 1
            logger.exception("a step failed")
            self._fail_step(processor, error)
            if self._in_a_row > FAILURES:
                for request in list(self.book.values()):
                    self._finish(request, Event(error="the engine stopped"))
                raise
        return True

    def _turn_beside(self) -> bool:
        """Whether there are requests that run beside the batch, each of which has gone a step."""
        began = self.clock()
        step = self.decodings.turn(self._finish)
        if step is not None and self.observer is not None:
            self.observer(step, self.clock() - began)
        return step is not None

    def _wait(self) -> None:
        now = self.clock()
        wake = self.policy.wake(now)
        self.manager._wake_up_loop.wait(timeout=IDLE if wake is None else min(IDLE, max(0.0, wake - now)))
        self.manager._wake_up_loop.clear()

    def _expire(self, processor: ContinuousBatchProcessor) -> None:
        for request_id in self._deadlines.passed(self.clock()):
            request = self.book.get(request_id)
            if request is not None:
                self._finish(request, Event(error="the request's deadline passed", kind=ErrorKind.DEADLINE))
                processor.scheduler.set_request_cancellation(request_id)

    def _publish(self, processor: ContinuousBatchProcessor) -> None:
        """Take rows that went wrong out of the batch before the engine's own bookkeeping sees their token."""
        runner: Runner = processor.model_runner
        for part in processor.scheduler.current.parts:
            if runner.results[part.state.request_id].error is not None:
                processor.scheduler.set_request_cancellation(part.state.request_id)

    def _settle(self, processor: ContinuousBatchProcessor) -> None:
        """Advance what policies see, and tell the sinks."""
        runner: Runner = processor.model_runner
        step: PackedStep = processor.scheduler.current
        now = self.clock()
        for part in step.parts:
            request, track = part.request, part.request.track
            request.levels[part.level] = request.levels.get(part.level, 0) + part.lasting
            request.begun = step.began if request.begun is None else request.begun
            first = track.first_token if track.first_token is not None or not part.yields else now
            track.advance(
                level=part.level,
                computed=track.computed + (part.tokens if part.is_prompt else 0),
                generated=track.generated + part.yields,
                first_token=first,
            )
            event = runner.results[part.state.request_id]
            finish = None
            if part.state.status == RequestStatus.FINISHED:
                finish = "stop" if event.token in request.stop_ids else "length"
            if request.job.id in self.book and not request.cancelled:
                for earlier in runner.before.get(part.state.request_id, ()):
                    request.sink(earlier)
                event = event._replace(finish=finish)
                if finish or event.error:
                    self._finish(request, event)
                elif event.token is not None or event.prompt:
                    request.sink(event)
            elif finish:
                self.book.pop(request.job.id, None)
        self._forget(runner)
        if self.drafts is not None:
            self.drafts.observe([(part.draft, part.is_prompt, part.yields) for part in step.parts], now - step.began)
        if self.observer is not None:
            self.observer(step, now - step.began)

    def _forget(self, runner: Runner) -> None:
        for request_id in [i for i in runner.samplers if i not in self.book]:
            del runner.samplers[request_id]
        if self.drafts is not None:
            self.drafts.forget(self.book)

    def _finish(self, request: Request, event: Event) -> None:
        self.book.pop(request.job.id, None)
        if not request.cancelled:
            request.sink(event)

    def _fail_step(self, processor: ContinuousBatchProcessor, error: Exception) -> None:
        """End the requests of a failed step, and only those."""
        for part in processor.scheduler.current.parts:
            processor.scheduler.finish_request(part.state.request_id)
            if part.request.job.id in self.book:
                self._finish(part.request, Event(error=f"the step failed: {type(error).__name__}"))


def layer_facts(elastic: Elastic) -> LayerFacts:
    """E, N and k of the model's MoE layers, as a cost model wants them."""
    plan = elastic.layers[0].parts
    return LayerFacts(plan.layer.num_experts, plan.n_sub, experts_per_token(elastic.model, plan.layer))

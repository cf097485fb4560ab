"""One forward pass of a step: logits only where they are asked for, tokens drawn per request."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.generation.continuous_batching.model_runner import ModelRunner

from ...offload.predict.base import HISTORY
from ..requests import ErrorKind, Event, TokenLogprob
from .earlier import EarlierTokens
from .paged_attention import NAME as PAGED
from .paged_attention import handed_over
from .sampling import Guesser, Sampler, draw, logprobs
from .scheduler import PolicyScheduler, StepPart

SAID = {
    ErrorKind.NOT_FINITE: "the model returned numbers that are not finite",
    ErrorKind.RULED_OUT: "what the request asks for leaves no token that could come next",
}


class Runner(ModelRunner):  # type: ignore[misc]
    """transformers' runner with our own logits and sampling. `results` holds what the last step found, by request id."""

    scheduler: PolicyScheduler

    @classmethod
    def over(cls, processor: Any, earlier: EarlierTokens | None = None) -> Runner:
        """The runner of a batch processor, in place of its own. earlier: shows the model's routers which tokens came before."""
        runner = cls(
            logit_processor=processor.logit_processor,
            cb_config=processor.cb_config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=processor.cache,
            do_sample=False,
            return_logprobs=False,
        )
        runner.scheduler = processor.scheduler
        runner.samplers, runner.earlier = {}, earlier
        runner.results, runner.before = {}, {}
        return runner

    samplers: dict[str, Sampler]
    earlier: EarlierTokens | None
    results: dict[str, Event]
    before: dict[str, list[Event]]
    """What a check drew before the token of `results`."""

    def _forward_process_and_sample(
        self, model: nn.Module, batch_data: dict[str, Any], carry_over_ids: Tensor, prev_output_ids: Tensor, output_ids: Tensor
    ) -> None:
        parts = self.scheduler.current.parts
        rows, spans = _rows(parts)
        sliced = "logits_to_keep" in batch_data
        if sliced:
            batch_data["logits_to_keep"] = rows.to(batch_data["input_ids"].device)
        if getattr(model.config, "_attn_implementation", None) == PAGED:
            handed_over(batch_data)
        watch = getattr(self.scheduler.elastic, "watch", None)
        if watch is not None:
            watch.tell(_before(parts))
        with nullcontext() if self.earlier is None else self.earlier.shown(self.scheduler.cache.moe_prism_layout):
            out = model(**batch_data).logits[0]
        logits = (out if sliced else out[rows]).float()
        self.results, self.before = {}, {}
        self._prompt_logprobs(parts, spans, logits)
        drawing = [(part, span[1] - 1) for part, span in zip(parts, spans, strict=True) if part.yields and part.draft is None]
        if drawing:
            self._draw([part for part, _ in drawing], logits[[row for _, row in drawing]])
        for part, span in zip(parts, spans, strict=True):
            if part.guesses:
                self._guess(part, logits[span[0] : span[1]])
            elif part.draft is not None:
                self._check(part, logits[span[0] : span[1]])
        tokens = [self.results[part.state.request_id].token or 0 for part in parts if part.yields]
        output_ids[0, : len(tokens)] = torch.tensor(tokens, dtype=output_ids.dtype)
        for part in parts:
            if self.results[part.state.request_id].error is None and not part.guesses:
                self.scheduler.remember_prefix(part)

    def _guess(self, part: StepPart, logits: Tensor) -> None:
        """One more token of a draft, from logits [1, V]. What is not finite is left to the check to say."""
        draft = part.draft
        assert draft is not None
        draft.guesser = draft.guesser or Guesser(self._sampler(part))
        (token,), _ = draw(logits, [draft.guesser])
        draft.guesses.append(token)
        part.state.tokens_to_process = [token]

    def _check(self, part: StepPart, logits: Tensor) -> None:
        """Draw behind the certain token and behind every guess that is right, from logits [guesses + 1, V]."""
        draft, drafts, request_id = part.draft, self.scheduler.drafts, part.state.request_id
        assert draft is not None and drafts is not None
        events: list[Event] = []
        for i in range(len(draft.guesses) + 1):
            self.results[request_id] = Event(level=part.level)
            (token,) = self._draw([part], logits[i : i + 1])
            events.append(self.results[request_id])
            ends = events[-1].error is not None or token in part.request.stop_ids
            if ends or i == len(draft.guesses) or token != draft.guesses[i]:
                break
        self.before[request_id] = events[:-1]
        part.yields = len(events)
        drafts.settled(request_id, part.state, [e.token or 0 for e in events])

    def _draw(self, parts: list[StepPart], logits: Tensor) -> list[int]:
        samplers = [self._sampler(part) for part in parts]
        tokens, failed = draw(logits, samplers)
        wanted = [i for i, s in enumerate(samplers) if s.sampling.logprobs is not None and not failed[i]]
        found: dict[int, TokenLogprob] = {}
        if wanted:
            count = max(samplers[i].sampling.logprobs or 0 for i in wanted)
            found = dict(zip(wanted, logprobs(logits[wanted], [tokens[i] for i in wanted], count), strict=True))
        for i, part in enumerate(parts):
            before, why = self.results[part.state.request_id], failed[i]
            self.results[part.state.request_id] = (
                Event(tokens[i], found.get(i), before.prompt, part.level) if why is None else Event(error=SAID[why], kind=why)
            )
        return tokens

    def _sampler(self, part: StepPart) -> Sampler:
        sampler = self.samplers.get(part.state.request_id)
        if sampler is None:
            request = part.request
            sampler = Sampler(request.sampling, request.tokens, request.stop_ids, request.matcher)
            self.samplers[part.state.request_id] = sampler
        return sampler

    def _prompt_logprobs(self, parts: list[StepPart], spans: list[tuple[int, int]], logits: Tensor) -> None:
        """Row i of a prompt predicts its token i + 1."""
        for part, (begin, end) in zip(parts, spans, strict=True):
            entries: list[TokenLogprob] = []
            sampling = part.request.sampling
            if part.is_prompt and sampling.prompt_logprobs is not None:
                first = part.request.track.computed
                if first == 0:
                    entries.append(TokenLogprob(part.request.tokens[0], None))
                targets = list(part.request.tokens[first + 1 : first + part.tokens + 1])
                entries += logprobs(logits[begin:end][: len(targets)], targets, sampling.prompt_logprobs) if targets else []
            self.results[part.state.request_id] = Event(prompt=tuple(entries), level=part.level)


def _before(parts: list[StepPart]) -> NDArray[np.int64]:
    """[T, HISTORY] the token ids before every row of a step, nearest first, -1 where nothing was."""
    found = np.full((sum(part.tokens for part in parts), HISTORY), -1, np.int64)
    for part in parts:
        state, at = part.state, part.state.position_offset
        begun = [*state.initial_tokens, *state.generated_tokens][max(0, at - HISTORY) : at]
        line = [*begun, *(state.initial_tokens[at : at + part.tokens] if part.is_prompt else state.tokens_to_process)]
        for i in range(part.tokens):
            nearest = line[max(0, len(begun) + i - HISTORY) : len(begun) + i][::-1]
            found[part.start + i, : len(nearest)] = nearest
    return found


def _rows(parts: list[StepPart]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Positions of the packed batch whose logits are wanted, and where each request's lie among them."""
    rows: list[int] = []
    spans = []
    for part in parts:
        begin = len(rows)
        end = part.start + part.tokens
        if (part.is_prompt and part.request.sampling.prompt_logprobs is not None) or (part.draft is not None and part.yields):
            rows.extend(range(part.start, end))
        elif part.yields or part.guesses:
            rows.append(end - 1)
        spans.append((begin, len(rows)))
    return torch.tensor(rows or [0]), spans

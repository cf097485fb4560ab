"""Generate from an elastic model at any operating point."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

import torch
from transformers import TextStreamer

from ..attention.ems import EmsCache, EmsSettings, attending
from ..cache_names import cache_argument
from ..elastic.rules import rules
from ..elastic.runtime import elastic_of
from ..errors import UsageError
from ..methods.decode.base import Retriever, Verifier
from ..methods.decode.run import Through, decoder_of
from ..model import end_tokens
from ..options.generate import GenerateOptions, TunedOptions
from ..point import FULL, OperatingPoint
from ..result import Result


@dataclass(frozen=True)
class Generated(Result):
    """One continuation. seconds: wall clock of the whole call on this machine.

    rewired: what fitting vectors to the prompt did, see `methods.skip.rewiring.Rewired`; None: it was not asked for. `point` has them.
    whole_experts: share of the layers' calls with dropped slots that took the time of whole experts, because blocks would take longer here.
    decoding: what the point's decoding method says of its work; empty without one.
    """

    prompt: str
    text: str
    point: OperatingPoint
    tokens: int
    seconds: float
    whole_experts: float = 0.0
    decoding: dict[str, Any] = field(default_factory=dict)
    rewired: dict[str, Any] | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "point": self.point.to_json(),
            "budget": self.point.slots.budget,
            "rule": self.point.slots.rule,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "whole_experts": self.whole_experts,
            **({"decoding": self.decoding} if self.point.decoding is not None else {}),
            **({} if self.rewired is None else {"rewired": self.rewired}),
            "tokens_per_s": self.tokens_per_s,
        }


class Hearing(TypedDict, total=False):
    """heard: called with every piece of the text as soon as it is certain; is_rendered: the prompt has its special tokens already.

    tuned: whether and how the router is fitted to the prompt first. verifier: (prompt, text) -> how good the text is; retriever: prompt ->
    text to stand before it: for methods of decoding that ask.
    """

    heard: Callable[[str], None]
    is_rendered: bool
    verifier: Verifier
    retriever: Retriever
    tuned: TunedOptions


class _Streamer(TextStreamer):  # type: ignore[misc]
    """transformers' own, to somebody else than stdout."""

    def __init__(self, tokenizer: Any, heard: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._heard = heard

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._heard(text)


def check_prompt(prompt: str) -> None:
    """UsageError for an empty one."""
    if not prompt:
        raise UsageError("the prompt is empty", "give some text with --prompt")


def asked_point(
    point: OperatingPoint | None, budget: float | None, rule: str | None, control: str | None = None
) -> OperatingPoint:
    """What a budget, a rule and a control make of a point, None of the model itself. UsageError for one that there is not."""
    if budget is not None and not 0 < budget <= 1:
        raise UsageError(f"budget {budget:g} is outside (0, 1]", "1 keeps every slot, 0.5 half of the bytes")
    if rule is not None:
        rules.get(rule)
    point = point or FULL
    if budget is None and rule is None:
        return point if control is None else replace(point, slots=replace(point.slots, control=control))
    return point.with_budget(point.slots.budget if budget is None else budget, rule, control or "")


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    budget: float | None = None,
    *,
    point: OperatingPoint | None = None,
    sampling: GenerateOptions | None = None,
    **how: Unpack[Hearing],
) -> Generated:
    """Continue a prompt at one operating point: a budget under the default rule, or whatever a point says.

    With both, the budget is of the slots that the point's routing leaves. how: see `Hearing`. Raises UsageError for an empty prompt, a bad
    number, or a prompt over the context limit.

    >>> import moe_prism
    >>> model, tokenizer = moe_prism.load("elastic")
    >>> made = moe_prism.generate(model, tokenizer, "import os", 0.5, sampling=moe_prism.GenerateOptions(max_tokens=4))
    >>> made.tokens, made.to_json()["budget"]
    (4, 0.5)
    """
    sampling, asked = sampling or GenerateOptions(), asked_point(point, budget, None)
    sampling.check()
    check_prompt(prompt)
    rows = tokenizer(prompt, return_tensors="pt", add_special_tokens=not how.get("is_rendered", False)).to(model.device)
    length = rows["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length + sampling.max_tokens > limit:
        raise UsageError(
            f"{length} prompt tokens + {sampling.max_tokens} new ones pass the context limit of {limit}", "shorten one of them"
        )
    ends = {"eos_token_id": sorted(found)} if (found := end_tokens(model, tokenizer)) else {}
    streamer = _Streamer(tokenizer, how["heard"]) if "heard" in how else None
    torch.manual_seed(sampling.seed)
    elastic = elastic_of(model)
    asked, fitted = _rewired(model, rows["input_ids"], asked, how.get("tuned"))
    method, own = decoder_of(elastic, asked), replace(asked, decoding=None)
    through = None
    if method is not None:
        through = Through(method, tokenizer, elastic, own, streamer=streamer)
        through.verifier, through.retriever = how.get("verifier"), how.get("retriever")
    before, began = elastic.tally(), time.perf_counter()
    with torch.no_grad(), elastic.at([own]), _remembering(model, sampling.kv_entries, through) as cache:
        ids = model.generate(
            **rows,
            max_new_tokens=sampling.max_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **ends,
            **_drawing(sampling),
            **cache,
            **({} if through is None else {"custom_generate": through}),
        )
    seconds, after, new = time.perf_counter() - began, elastic.tally(), ids[0, length:]
    whole = (after.whole - before.whole) / max(1, after.calls - before.calls)
    text, facts = tokenizer.decode(new, skip_special_tokens=True), {} if through is None else through.facts
    return Generated(prompt, text, asked, len(new), seconds, whole, facts, fitted)


def _drawing(sampling: GenerateOptions) -> dict[str, Any]:
    warm = sampling.temperature > 0
    return {"do_sample": warm, **({"temperature": sampling.temperature} if warm else {})}


@contextmanager
def _remembering(model: Any, entries: int | None, through: Through | None) -> Iterator[dict[str, Any]]:
    """The cache of attention that was asked for, as an argument of `generate`; None: transformers' own."""
    if entries is None:
        yield {}
        return
    if through is not None:
        raise UsageError("a bounded cache and a method of decoding were both asked for", "leave one of them out")
    layers = int(model.config.get_text_config().num_hidden_layers)
    with attending(model, EmsCache(layers, EmsSettings(entries=entries))) as cache:
        yield cache_argument(model, cache)


def _rewired(
    model: Any, ids: torch.Tensor, point: OperatingPoint, tuned: TunedOptions | None
) -> tuple[OperatingPoint, dict[str, Any] | None]:
    """The point with vectors that were fitted to a prompt ids [1, length] before its other stages, and what fitting did."""
    if tuned is None or not tuned.rewire:
        return point, None
    from ..methods.skip.rewiring import Rewiring, rewire

    if point.weights is not None:
        raise UsageError("--rewire does not go with a point that changes the weights", "leave one of them out")
    settings = Rewiring(steps=tuned.rewire, share=tuned.rewire_share, sure=tuned.rewire_sure, rate=tuned.rewire_rate)
    done = rewire(model, elastic_of(model), ids, settings)
    return point if done.stage is None else replace(point, routing=(done.stage, *point.routing)), done.to_json()

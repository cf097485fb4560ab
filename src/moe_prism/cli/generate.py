"""`moe-prism generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UsageError
from ..options.experts import ExpertOptions
from ..options.generate import GenerateOptions, PointOptions, TunedOptions
from .experts import store_options
from .output import emit, note

if TYPE_CHECKING:
    from ..jobs.conversation import Conversation
    from ..jobs.generate import Generated
    from ..point import OperatingPoint
    from ..store import StoreOptions

ADAPTER = "adapter"
ENDS = ("/exit", "/quit")


def generate(
    folder: Path,
    /,
    *,
    prompt: str | None = None,
    chat: bool = False,
    at: PointOptions,
    options: GenerateOptions,
    experts: ExpertOptions,
    tuned: TunedOptions,
    verify: bool = False,
    json: bool = False,
) -> None:
    """Continue a prompt, or hold a conversation, at an operating point. The text appears as it is made.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, or any checkpoint, at full price or with a --point that fits it.
    prompt: Text to continue. Default: what is piped in, else you are asked for one after the other, until /exit.
    chat: Write prompts as the model's chat template wants them; asked one after the other, it remembers the turns before.
    verify: First compare every file of the folder with its sha256 in prism.json; without, only those that are small.
    json: One JSON object on stdout.
    """
    if at.point is not None and folder.is_dir():
        from ..point.named import find_point

        find_point(at.point, folder)  # or a name that is not there is refused, before the work is imported
    store = store_options(experts)
    from ..jobs.generate import check_prompt
    from ..methods.decode.run import function_of

    prompts = _prompts(prompt, json)
    if isinstance(prompts, str):
        check_prompt(prompts)
    if tuned.adapter is not None and experts.expert_memory is not None:
        raise UsageError("--adapter needs the model's experts in memory", "leave --expert-memory out")
    asks = {name: function_of(text) for name in ("verifier", "retriever") if (text := getattr(at, name)) is not None}
    model, tokenizer, point = _open(folder, at, experts, store, verify)
    asked = at.point or f"budget {point.slots.budget:g}"
    with _worn(model, folder, tuned.adapter), _conversation(tokenizer) if chat else nullcontext() as talk:
        call = _Call(model, tokenizer, point, options, talk, {**asks, **({"tuned": tuned} if tuned.rewire else {})})
        if isinstance(prompts, str):
            result = call(prompts, is_silent=json)
            _note(result, asked)
            return emit({**result.to_json(), "prompt": prompts}, "", True) if json else None
        for text in prompts:
            _note(call(text), asked)
    return None


class _Call(NamedTuple):
    """What stays the same from prompt to prompt."""

    model: Any
    tokenizer: Any
    point: OperatingPoint
    options: GenerateOptions
    talk: Conversation | None
    asks: dict[str, Any]

    def __call__(self, text: str, is_silent: bool = False) -> Generated:
        from ..jobs.generate import generate as run

        is_begun = self.talk is not None or is_silent

        def hear(piece: str) -> None:
            nonlocal is_begun
            _write(piece if is_begun else text + piece)  # the prompt only once there is an answer: an error leaves stdout empty
            is_begun = True

        how: dict[str, Any] = {**self.asks, **({} if is_silent else {"heard": hear})}
        prompt = text if self.talk is None else self.talk.ask(text)
        result = run(
            self.model, self.tokenizer, prompt, point=self.point, sampling=self.options, is_rendered=self.talk is not None, **how
        )
        if self.talk is not None:
            self.talk.hear(result.text)
        if not is_silent:
            _write("\n" if is_begun else f"{text}\n")
        return result


def _prompts(prompt: str | None, is_json: bool) -> str | Iterator[str]:
    """The one prompt, or those that somebody at a terminal gives. UsageError where nobody can be asked."""
    if prompt is not None:
        return prompt
    if not sys.stdin.isatty():
        return sys.stdin.read().rstrip("\n")
    if is_json:
        raise UsageError("--json makes one object of one prompt", "give it with --prompt, or pipe it in")
    return _asked()


def _asked() -> Iterator[str]:
    note(f"type a prompt; {ENDS[0]} or the end of input ends this")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() in ENDS:
            return
        if line.strip():
            yield line.rstrip("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _conversation(tokenizer: Any) -> Conversation:
    from ..jobs.conversation import Conversation

    return Conversation(tokenizer)


@contextmanager
def _worn(model: Any, folder: Path, adapter: Path | None) -> Iterator[None]:
    """Inside, whatever the model computes has the adapter of a folder."""
    if adapter is None:
        yield
        return
    from ..jobs.adapter import with_adapters

    with with_adapters(model, folder, {ADAPTER: adapter}) as adapters:
        own = adapters.loaded[ADAPTER]
        note(f"adapter: {own.experts} tuned experts, {own.bytes / 1e6:.1f} MB of memory beside the model")
        with adapters.at(ADAPTER):
            yield


def _open(
    folder: Path, at: PointOptions, experts: ExpertOptions, store: StoreOptions | None, verify: bool
) -> tuple[Any, Any, OperatingPoint]:
    """(model, tokenizer, point)."""
    from ..artefact.load import load, whole_manifest
    from ..artefact.open import open_to_write, own_point
    from ..jobs.generate import asked_point
    from ..methods.decode.run import asked_decoding
    from ..point import name_within

    if verify:
        whole_manifest(folder, every=True)
    if at.point is not None and at.bytes_per_token is not None:
        raise UsageError("--point and --bytes-per-token both choose a point", "give one of them")
    asked = name_within(at.bytes_per_token, folder) if at.bytes_per_token is not None else at.point
    named = None if asked is None else own_point(asked, folder).point
    point = asked_point(named, at.budget, at.rule, at.control)
    if at.decode is not None:
        point = replace(point, decoding=asked_decoding(at.decode))
    if experts.miss_floor != 1 and experts.miss_floor >= point.slots.budget:
        raise UsageError(
            f"--miss-floor {experts.miss_floor:g} is not below --budget {point.slots.budget:g}", "lower it, or leave it out"
        )
    if store is not None:
        return *load(folder, store=store), point
    return *open_to_write(folder), point


def _note(result: Generated, asked: str) -> None:
    if result.rewired is not None:
        said = result.rewired
        losses = " to ".join(f"{said[name]:.4f}" for name in ("before", "after"))
        held = " to ".join(f"{said[name]:.4f}" for name in ("held_before", "held_after"))
        note(
            f"rewired {len(said['layers'])} layers in {said['steps']} steps: loss of the prompt {losses}, of its held-out part {held}"
        )
    note(f"{asked}: {result.tokens} tokens, {result.tokens_per_s:.1f} tokens/s")
    if result.decoding:
        note(", ".join(f"{name} {value}" for name, value in result.decoding.items()))
    if result.whole_experts > 0:
        share = f"{100 * result.whole_experts:.0f} %"
        note(f"in {share} of the layers' calls whole experts took less time than the kept blocks: full price, same result")

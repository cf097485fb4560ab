"""Every field that a client of OpenAI's API or of vLLM may send, and what becomes of it. One rule: a field that would change the answer
is done, or refused by name; only a field without effect is ignored, and the header x-moe-prism-ignored lists it. A field that nobody
knows may be a misspelt one that matters, so it is refused too. null is left out.

What is done stands in `protocol`, field by field with its check. What is not done stands here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from .refusal import Refusal
from .values import Json

Endpoint = Literal["completions", "chat"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BOTH = _names(
    """frequency_penalty logit_bias logprobs max_tokens model n presence_penalty seed stop stream stream_options temperature top_p user"""
)
OPENAI: dict[Endpoint, frozenset[str]] = {
    "completions": _BOTH | _names("best_of echo prompt suffix"),
    "chat": _BOTH
    | _names(
        """audio function_call functions max_completion_tokens messages metadata modalities moderation parallel_tool_calls prediction
        prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier service_tier store
        tool_choice tools top_logprobs verbosity web_search_options"""
    ),
}
"""OpenAI's fields. A test compares them with the openai package."""
_EXTRAS = _names(
    """use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos
    min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
    logprob_token_ids bad_words add_special_tokens response_format structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets mm_payload return_mm_kwargs cache_salt
    kv_transfer_params ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval echo
    return_weight_versions"""
)
VLLM: dict[Endpoint, frozenset[str]] = {
    "completions": _BOTH | _EXTRAS | _names("prompt suffix prompt_embeds"),
    "chat": _BOTH
    | _EXTRAS
    | _names(
        """messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning parallel_tool_calls
        add_generation_prompt continue_final_message documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
        return_prompt_text"""
    ),
}
"""vLLM's fields, of 0.33. A test compares them with vLLM."""
OURS = frozenset({"quality", "min_quality", "class", "ttft_ms", "tpot_ms", "priority", "self_draft", "decode", "rewire"})


@dataclass(frozen=True)
class NotDone:
    """A field that we know and do not act on. check: what it may hold; neutral: values that ask for nothing, of one that is refused."""

    why: str
    check: Any
    neutral: tuple[Any, ...] = ()
    instead: str = ""
    example: Any = None  # a value that would ask for something


_TEXT = Annotated[StrictStr, Field(max_length=4096)]
_ANY = Any

REFUSED: dict[str, NotDone] = {
    "suffix": NotDone("the model only continues a text", _TEXT, ("",), example="x"),
    "functions": NotDone("this is the old form", _ANY, ([],), "tools", [{"name": "f"}]),
    "function_call": NotDone("this is the old form", _ANY, ("none", "auto"), "tool_choice", {"name": "f"}),
    "guided_json": NotDone("this is the old form", _ANY, (), "structured_outputs", {}),
    "guided_regex": NotDone("this is the old form", _ANY, (), "structured_outputs", "a+"),
    "guided_choice": NotDone("this is the old form", _ANY, (), "structured_outputs", ["a"]),
    "guided_grammar": NotDone("this is the old form", _ANY, (), "structured_outputs", 'root ::= "a"'),
    "audio": NotDone("the model answers in text", Json, example={"voice": "alloy", "format": "wav"}),
    "modalities": NotDone("the model answers in text", list[_TEXT], (["text"],), example=["audio"]),
    "moderation": NotDone("nothing is moderated", _ANY, example={"model": "x"}),
    "prediction": NotDone("nothing is predicted ahead", Json, example={"type": "content", "content": "x"}),
    "verbosity": NotDone("the model has no such control", _TEXT, example="low"),
    "web_search_options": NotDone("the server searches nothing", Json, example={"search_context_size": "low"}),
    "use_beam_search": NotDone("there is no beam search", StrictBool, (False,), example=True),
    "length_penalty": NotDone("there is no beam search", float, (1.0, 1), example=0.5),
    "watermarking": NotDone("no answer is marked", StrictBool, (False,), example=True),
    "bad_words": NotDone("words are not forbidden", list[_TEXT], ([],), "logit_bias", ["x"]),
    "logprob_token_ids": NotDone("chosen tokens have no log-probabilities of their own", list[StrictInt], ([],), "logprobs", [1]),
    "prompt_embeds": NotDone("a request carries no tensors", _ANY, ([],), example="x"),
    "mm_payload": NotDone("this model reads nothing but text", _ANY, example={}),
    "return_mm_kwargs": NotDone("this model reads nothing but text", StrictBool, (False,), example=True),
    "media_io_kwargs": NotDone("this model reads nothing but text", Json, ({},), example={"image": {}}),
    "mm_processor_kwargs": NotDone("this model reads nothing but text", Json, ({},), example={"x": 1}),
    "return_tokens_as_token_ids": NotDone("tokens are shown by their text", StrictBool, (False,), "return_token_ids", True),
    "return_token_offsets": NotDone("it is not done", StrictBool, (False,), "logprobs, which has text_offset,", True),
    "return_prompt_text": NotDone("it is not done", StrictBool, (False,), "/tokenize", True),
    "return_weight_versions": NotDone("a server's weights never change", StrictBool, (False,), example=True),
    "routed_experts_prompt_start": NotDone("routing is not reported", StrictInt, (0,), example=3),
    "kv_transfer_params": NotDone("caches are not moved between servers", Json, ({},), example={"x": 1}),
    "ec_transfer_params": NotDone("caches are not moved between servers", Json, ({},), example={"x": 1}),
    "vllm_xargs": NotDone(
        "they are fields of their own here", Json, ({},), "quality and min_quality in the body", {"quality": 0.9}
    ),
    "repetition_detection": NotDone("nothing looks for repetitions", Json, example={"max_pattern_size": 3}),
    "thinking_token_budget": NotDone("thinking is not told from the answer", _ANY, example=5),
    "include_reasoning": NotDone("thinking is not told from the answer", StrictBool, (True,), example=False),
    "truncation_side": NotDone("only the beginning of a prompt can be left out", _TEXT, ("left",), example="right"),
    "documents": NotDone("there is no retrieval", list[Json], ([],), "messages", [{"title": "a", "text": "b"}]),
    "chat_template": NotDone("a template is a program, and a request carries data only", _TEXT, example="{{ messages }}"),
    "logits_processors": NotDone("a request carries data only", _ANY, ([],), example=["x"]),
}
"""Refused by name, unless the value is one that asks for nothing."""

WITHOUT_EFFECT: dict[str, NotDone] = {
    "user": NotDone("clients are not told apart by it", Annotated[StrictStr, Field(max_length=256)], example="u"),
    "store": NotDone("nothing is stored", StrictBool, example=True),
    "metadata": NotDone("nothing is stored", Json, example={"a": "b"}),
    "service_tier": NotDone("there is one; `class` has the classes", _TEXT, example="auto"),
    "safety_identifier": NotDone("clients are not told apart by it", _TEXT, example="u"),
    "prompt_cache_key": NotDone("prefixes are found by their tokens", _TEXT, example="k"),
    "prompt_cache_options": NotDone("prefixes are found by their tokens", Json, example={"mode": "explicit"}),
    "prompt_cache_retention": NotDone("prefixes stay as long as there is room", _TEXT, example="24h"),
    "spaces_between_special_tokens": NotDone("no tokenizer here puts spaces there", StrictBool, example=True),
    "request_id": NotDone("the server makes its own", _TEXT, example="r"),
    "session_id": NotDone("requests do not belong together", _TEXT, example="s"),
    "stream_interval": NotDone("every token is sent when it is there", Annotated[StrictInt, Field(ge=1)], example=2),
}
"""Ignored, and listed in the header x-moe-prism-ignored."""

ADAPTERS = {name: TypeAdapter(field.check) for name, field in {**REFUSED, **WITHOUT_EFFECT}.items()}


def sort_out(data: Mapping[str, Any], done: Iterable[str], endpoint: Endpoint) -> tuple[dict[str, Any], list[str]]:
    """The fields of a body that are done, and the names of those without effect. Raises a Refusal for one that is not done."""
    kept: dict[str, Any] = {}
    ignored: list[str] = []
    known = set(done)
    for name, value in data.items():
        if value is None:
            continue
        if name in known:
            kept[name] = value
        elif name in WITHOUT_EFFECT:
            _check(name, value)
            ignored.append(name)
        elif name in REFUSED:
            _refuse(name, value)
        else:
            raise _unknown(name, known, endpoint)
    return kept, sorted(ignored)


def _check(name: str, value: object) -> None:
    try:
        ADAPTERS[name].validate_python(value)
    except ValidationError as error:
        raise _error("invalid_value", f"{name}: {error.errors()[0]['msg']}", name) from None


def _refuse(name: str, value: object) -> None:
    field = REFUSED[name]
    if any(type(value) is type(neutral) and value == neutral for neutral in field.neutral):
        return
    _check(name, value)
    instead = f"; use {field.instead}" if field.instead else "; leave it out"
    raise _error("unsupported", f"'{name}' is not supported: {field.why}{instead}", name)


def _unknown(name: str, known: set[str], endpoint: Endpoint) -> Refusal:
    shown = name[:64] if name.isidentifier() and name.isascii() else "(not an identifier)"
    if name in done_elsewhere(endpoint):
        return _error(
            "unsupported", f"'{shown}' belongs to {'/v1/completions' if endpoint == 'chat' else '/v1/chat/completions'}", shown
        )
    near = difflib.get_close_matches(name[:64], [*known, *WITHOUT_EFFECT], 1)
    hint = f"; did you mean '{near[0]}'?" if near else "; see docs/reference/requests.md"
    return _error("unknown_field", f"there is no field '{shown}'{hint}", shown)


def done_elsewhere(endpoint: Endpoint) -> frozenset[str]:
    """Fields of OpenAI and vLLM that the other endpoint has."""
    other: Endpoint = "completions" if endpoint == "chat" else "chat"
    return (OPENAI[other] | VLLM[other]) - OPENAI[endpoint] - VLLM[endpoint]


def _error(code: str, message: str, param: str) -> Refusal:
    return Refusal(400, message[:500], param=param, code=code)

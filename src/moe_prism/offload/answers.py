"""A trace from the answers of other servers: vLLM's and SGLang's `routed_experts`.

Both are started with `--enable-return-routed-experts`. vLLM puts an array [n, layers, k] into every choice, as base64 of an .npy file.
SGLang, where a request says `"return_routed_experts": true`, puts base64 of int32 numbers into `meta_info`. n counts the tokens of prompt
and answer but for the last one. Everything comes from outside: sizes are checked before anything is allocated.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptError, UsageError
from ..schema import JsonBounds, decode
from .trace import DECODE, FORMAT, PREFILL, Array, Trace, check

AGAIN = "ask the server again, with routed experts in its answers"
LINE = JsonBounds(bytes=256 << 20)
MOST_ROWS = 1 << 22


@dataclass(frozen=True)
class RoutedShape:
    """Of a model: its layers in all, the numbers of those that are MoE, their experts, and experts per token."""

    layers: int
    moe: Sequence[int]
    experts: int
    k: int


def read_answers(file: Path, shape: RoutedShape, model: str) -> Trace:
    """One answer per line, JSON as the server gave it. The first half of the answers is the calibration side.

    UsageError or CorruptError, in one line, for what holds no routing of this model. Routing weights are not told, so all are 1/k.
    """
    found: list[tuple[Array, int]] = []
    rows = 0
    for number, line in _lines(file):
        for ids, prompt in _of_answer(decode(line, f"{file}: line {number}", AGAIN, LINE), f"{file}: line {number}", shape):
            rows += len(ids)
            if rows > MOST_ROWS:
                raise UsageError(f"{file} holds more than {MOST_ROWS} tokens", "split it")
            found.append((ids, prompt))
    if not found:
        raise UsageError(f"no answer in {file} has routed experts", AGAIN)
    ids = np.concatenate([own for own, _ in found])
    length = [len(own) for own, _ in found]
    position = np.concatenate([np.arange(n) for n in length])
    prompts = np.repeat([p for _, p in found], length)
    request = np.repeat(np.arange(len(found)), length)
    phase = np.where(position < prompts, PREFILL, DECODE).astype(np.int8)
    begins = np.r_[True, (request[1:] != request[:-1]) | (phase[1:] == DECODE)]  # a prompt is one step
    header = {
        "format": FORMAT,
        "layers": len(shape.moe),
        "experts": shape.experts,
        "k": shape.k,
        "n_sub": 1,
        "model": model,
        "text": "answers of another server",
        "token_ids": False,
    }
    trace = Trace(
        header,
        ids.astype(np.int16),
        np.full(ids.shape, 1 / shape.k, np.float16),
        request.astype(np.int32),
        position.astype(np.int32),
        phase,
        (np.cumsum(begins) - 1).astype(np.int32),
        (2 * request >= len(found)).astype(np.int8),
        np.full(len(ids), -1, np.int32),
    )
    check(trace, str(file))
    return trace


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(LINE.bytes + 1):
                number += 1
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}", "give a file with one answer per line") from error


def _of_answer(answer: Any, where: str, shape: RoutedShape) -> Iterator[tuple[Array, int]]:
    """(ids [n, L, k], tokens of the prompt) of every choice of an answer."""
    for one in answer if isinstance(answer, list) else [answer]:
        if not isinstance(one, dict):
            raise CorruptError(f"{where} is no answer of a server", AGAIN)
        usage, meta = one.get("usage"), one.get("meta_info")
        if isinstance(meta, dict):
            routed, counted = [meta.get("routed_experts")], meta
        else:
            choices = one.get("choices")
            routed = [choice.get("routed_experts") for choice in choices or () if isinstance(choice, dict)]
            counted = usage if isinstance(usage, dict) else {}
        prompt = counted.get("prompt_tokens")
        for text in routed:
            if not isinstance(text, str):
                raise UsageError(f"{where} has no routed experts", AGAIN)
            if not isinstance(prompt, int) or isinstance(prompt, bool) or prompt < 0:
                raise UsageError(f"{where} does not say how many tokens its prompt has", "keep the whole answer, usage included")
            given = counted.get("completion_tokens")
            tokens = prompt + given - 1 if isinstance(given, int) and not isinstance(given, bool) else None
            yield _chosen(_array(text, where), where, shape, tokens), prompt


def _array(text: str, where: str) -> Array:
    """The numbers of a base64 text: an .npy file, or bare int32."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorruptError(f"{where}: routed experts are no base64", AGAIN) from error
    if not data.startswith(np.lib.format.MAGIC_PREFIX):
        if len(data) % 4:
            raise CorruptError(f"{where}: routed experts are no int32 numbers", AGAIN)
        return np.frombuffer(data, "<i4")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        size, by_column, kind = head(stream)
    except ValueError as error:
        raise CorruptError(f"{where}: routed experts are no .npy file", AGAIN) from error
    rest = data[stream.tell() :]
    if by_column or kind.kind not in "iu" or int(np.prod(size, dtype=object)) * kind.itemsize != len(rest):
        raise CorruptError(f"{where}: routed experts are not the whole numbers that their head says", AGAIN)
    return np.frombuffer(rest, kind).reshape(size)


def _chosen(array: Array, where: str, shape: RoutedShape, tokens: int | None) -> Array:
    """ids [n, MoE layers, k] of what a server gave for all layers, or for the MoE layers. tokens: n, where the answer says it."""
    layers = shape.layers
    if array.ndim == 3:
        layers = array.shape[1]
    elif tokens is not None and tokens > 0:
        layers = array.size // (tokens * shape.k)
    if layers not in (shape.layers, len(shape.moe)) or array.size % max(1, layers * shape.k) or not array.size:
        said = "x".join(map(str, array.shape))
        raise UsageError(
            f"{where}: routed experts {said} are not those of {shape.layers} layers with {shape.k} experts per token",
            "give the model that answered",
        )
    found: Array = array.reshape(-1, layers, shape.k)
    if array.ndim == 3 and array.shape[2] != shape.k:
        raise UsageError(f"{where}: {array.shape[2]} experts per token instead of {shape.k}", "give the model that answered")
    found = found if layers == len(shape.moe) else found[:, list(shape.moe)]
    if found.min() < 0 or found.max() >= shape.experts:
        raise UsageError(f"{where}: an expert outside 0..{shape.experts - 1}", "give the model that answered")
    return found

"""From the decoding part of a point to its method, and through transformers' `generate`."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...catalogue import methods
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import Decoding, OperatingPoint
from ...registry import View
from .base import DecodeMethod, DecodeRun, Retriever, Verifier, read_settings
from .sequence import Spent

decoders: View[type[DecodeMethod]] = methods.only("decoding", "decoding method")


def asked_decoding(text: str) -> Decoding:
    """What a user writes, NAME or NAME:SETTINGS, as it stands in a point. UsageError for what is not known."""
    plain, colon, argument = text.partition(":")
    kind = decoders.get(plain)
    return kind(plain, kind.read_argument(plain, argument if colon else None)).part()


def function_of(asked: str) -> Callable[..., Any]:
    """The function of a Python file, from FILE.py:FUNCTION, whose code runs. UsageError where there is none."""
    file, colon, name = asked.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise UsageError(f"'{asked}' names no function of a file", "write FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise UsageError(f"there is no file {file}", "write FILE.py:FUNCTION")
    found = runpy.run_path(file).get(name)
    if not callable(found):
        raise UsageError(f"{file} has no function '{name}'", "write FILE.py:FUNCTION")
    return found  # type: ignore[no-any-return]


def decoder_of(elastic: Elastic, point: OperatingPoint) -> DecodeMethod | None:
    """The method of a point's decoding, checked against the model; None where it has none."""
    part = point.decoding
    if part is None:
        return None
    made = read_settings(decoders.get(part.method), part.method, part.settings)
    made.check(elastic, replace(point, decoding=None))
    return made


@dataclass
class Through:
    """`custom_generate` of transformers, by a method of ours. facts, spent: of the last call.

    streamer: as `generate` got it, which tells it of the prompt, and hands it to nobody.
    """

    method: DecodeMethod
    tokenizer: Any
    elastic: Elastic
    point: OperatingPoint
    counting: bool = False
    verifier: Verifier | None = None
    retriever: Retriever | None = None
    streamer: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Any], Tensor],
        generation_config: Any,
        **_: Any,
    ) -> Tensor:
        """ids [1, t] with the answer. UsageError for more than one prompt."""
        if len(input_ids) != 1:
            raise UsageError(f"{len(input_ids)} prompts at once", "decode them one after the other")
        self.spent = Spent(self.counting)
        device = input_ids.device

        def hear(token: int) -> None:
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))

        made = self.method.decode(
            DecodeRun(
                model=model,
                tokenizer=self.tokenizer,
                elastic=self.elastic,
                point=replace(self.point, decoding=None),
                prompt=input_ids[0].tolist(),
                shaped=logits_processor,
                ended=lambda ids: bool(stopping_criteria(ids, None).all()),
                samples=bool(generation_config.do_sample),
                heard=hear,
                spent=self.spent,
                verifier=self.verifier,
                retriever=self.retriever,
            )
        )
        self.facts = made.facts
        if self.streamer is not None:
            self.streamer.end()
        return torch.tensor([made.tokens], device=device)

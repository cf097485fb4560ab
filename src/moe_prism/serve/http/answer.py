"""One HTTP request on its way to its answer: what was asked, its sequences, and how they are written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spans import Ended, Stages
from .admission import Place
from .answers import Words, usage
from .protocol import ChatRequest, Common
from .service import Service
from .strands import Piece, Strand, Wish

logger = logging.getLogger("moe_prism.requests")


@dataclass
class Answer:
    """What is given back whichever way the request ends. prompts: token ids of the distinct prompts."""

    service: Service
    body: Any  # of `protocol.Common`
    id: str
    created: int
    prompts: list[list[int]]
    wish: Wish
    place: Place
    strands: list[Strand]
    began: float
    passed_on: Mapping[str, str]  # request_id and traceparent of its client
    closed: bool = False

    def __post_init__(self) -> None:
        assert isinstance(self.body, Common)
        self.chat = isinstance(self.body, ChatRequest)
        self.words = Words(self.service.words, hide=self.body.skip_special_tokens)

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.strands, sum(len(p) for p in self.prompts))

    def base(self, *, chunk: bool) -> dict[str, Any]:
        """What every object of the answer begins with."""
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        fingerprint = self.service.fingerprint
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": f"{self.service.name}:{self.wish.adapter}" if self.wish.adapter else self.service.name,
            "system_fingerprint": fingerprint,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer that is not streamed."""
        served = self.service.served(self.strands)
        content = {
            **self.base(chunk=False),
            "choices": [self._choice(s, piece) for s, piece in zip(self.strands, pieces, strict=True)],
            "usage": self.usage,
            "moe_prism": served,
        }
        content["system_fingerprint"] += f"-{served['point']}"
        return content

    def _choice(self, strand: Strand, piece: Piece) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": piece.text, "refusal": None}} if self.chat else {"text": piece.text}
        return {**self.about(strand, piece), **said}

    def about(self, strand: Strand, piece: Piece) -> dict[str, Any]:
        """What a choice says beside its text."""
        top, body = self.body.top, self.body
        choice: dict[str, Any] = {"index": strand.index, "finish_reason": piece.finish, "logprobs": None}
        if top is not None and piece.logprobs:
            choice["logprobs"] = (self.words.chat if self.chat else self.words.completion)(piece.logprobs, top)
        if piece.finish:
            choice["stop_reason"] = piece.reason
        if piece.facts is not None:
            choice["decoding"] = piece.facts
        if body.prompt_logprobs is not None and piece.prompt:
            choice["prompt_logprobs"] = self.words.prompt(piece.prompt, body.prompt_logprobs)
        if body.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
            choice["prompt_token_ids"] = strand.asked.prompt
        return choice

    def close(self, reason: str) -> None:
        """Give everything back and write the log line; the text is in neither. Only the first call counts."""
        if self.closed:
            return
        self.closed = True
        for strand in self.strands:
            self.service.drop(strand)
        self.place.leave()
        self.service.metrics.finish(reason)
        served = self.service.served(self.strands)
        now = self.service.engine.clock()
        fields = {
            "id": self.id,
            **self.passed_on,
            "class": self.wish.kind.name,
            **({"adapter": self.wish.adapter} if self.wish.adapter else {}),
            "end": reason,
            "prompt_tokens": sum(len(p) for p in self.prompts),
            "completion_tokens": sum(s.generated for s in self.strands),
            "point": served["point"],
            "quality": served["quality"],
            "seconds": round(now - self.began, 4),
        }
        logger.info("request", extra={"fields": fields})
        if self.service.spans is not None:
            self.service.spans.write(self._ended(reason, now, fields, served["slots"]))

    def _ended(self, reason: str, now: float, fields: Mapping[str, Any], slots: float | None) -> Ended:
        """What its span says."""
        model, operation = self.service.name, "chat" if self.chat else "text_completion"
        return Ended(
            name=f"{operation} {model}",
            traceparent=self.passed_on.get("traceparent"),
            start=self.began,
            end=now,
            sequences=tuple(Stages(s.started, s.request.begun, s.first, s.last) for s in self.strands),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "moe_prism",
                "gen_ai.request.model": model,
                "gen_ai.response.id": self.id,
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.input_tokens": fields["prompt_tokens"],
                "gen_ai.usage.output_tokens": fields["completion_tokens"],
                "moe_prism.class": self.wish.kind.name,
                "moe_prism.adapter": self.wish.adapter or None,
                "moe_prism.point": fields["point"],
                "moe_prism.quality": fields["quality"],
                "moe_prism.slots": slots,
                "moe_prism.cached_tokens": sum(s.request.cached_tokens for s in self.strands),
                "moe_prism.request_id": self.passed_on.get("request_id"),
            },
            failed=reason == "error",
        )

"""What a request may ask of methods of decoding: named by the operator, bounded, and refused by name where it goes with nothing else."""

from __future__ import annotations

from typing import Any

from ...errors import UsageError
from ..requests import PLAIN
from .refusal import Refusal
from .service import Service
from .strands import Wish

ALONE = {
    "logprobs": "several forwards stand behind a token, and none of them has its probability",
    "prompt_logprobs": "several forwards stand behind a token, and none of them has its probability",
    "response_format": "a form follows one sequence alone",
    "structured_outputs": "a form follows one sequence alone",
    "self_draft": "a request decodes in one way",
}
"""Fields that do not go with a method, and why."""


def check_decoding(service: Service, body: Any, wish: Wish) -> None:
    """Refusal for a method that this server does not have, or that cannot be done together with what else the request asks for."""
    asked, param = body.decode or PLAIN, "decode"
    name = asked.partition(":")[0]
    if asked != PLAIN:
        if name not in service.decoding or name == REWIRING:
            served = [known for known in service.decoding if known != REWIRING]
            raise Refusal(
                400,
                f"decode: this server has {', '.join(served) or 'no method of decoding'}; an operator starts it with --decoding",
                param=param,
                code="unsupported",
            )
        _check_settings(service, name, asked)
    if body.rewire:
        param = "rewire" if asked == PLAIN else param
        if REWIRING not in service.decoding:
            raise Refusal(
                400, "rewire: this server fits no router; start it with --decoding rewiring", param="rewire", code="unsupported"
            )
        if wish.adapter:
            raise Refusal(400, "rewire: it is fitted to the model itself, and not to an adapter", param="rewire")
    if asked == PLAIN and not body.rewire:
        return
    for field, why in ALONE.items():
        value = getattr(body, field)
        if (value is not None and value is not False) and not (field == "response_format" and value.type == "text"):
            raise Refusal(400, f"{param} does not go with {field}: {why}", param=field)
    _check_point(service, wish, param)


REWIRING = "rewiring"


def _check_settings(service: Service, name: str, asked: str) -> None:
    from ...methods.decode.base import read_settings
    from ...methods.decode.run import asked_decoding, decoders

    try:
        part = asked_decoding(asked)
        method = read_settings(decoders.get(name), name, part.settings)
    except UsageError as error:
        raise Refusal(400, f"decode: {error.cause}; {error.next_step}", param="decode") from error
    most = service.config.bounds.sequences
    if method.sequences > most:
        raise Refusal(
            400, f"decode: {method.sequences} sequences at once, and this server holds {most} (bounds.sequences)", param="decode"
        )
    if method.asks_verifier and not service.verifies:
        raise Refusal(
            400, f"decode: '{name}' needs a verifier; start the server with --verifier", param="decode", code="unsupported"
        )


def _check_point(service: Service, wish: Wish, param: str) -> None:
    """A budget that is held for the mean of a request counts tokens, and a method takes some of them back."""
    level = service.ladder.levels[wish.ceiling]
    slots = level.point.slots
    if slots.budget < 1 and slots.control != "none":
        raise Refusal(
            400,
            f"{param} does not go with operating point '{level.name}', whose budget is held over a request; ask for another quality",
            param="quality",
        )

"""What is at an address: an OpenAI server, which model it serves, and whether that has operating points."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import PrismError, UsageError
from ..point import FULL, OperatingPoint
from ..schedule.base import Ladder, Level
from .http import Address, Broken, ResponseReader, fetch

PLAIN = Ladder((Level("full", FULL, 1.0, 1.0),))


@dataclass(frozen=True)
class Target:
    """A server that answered. ladder: its operating points; of a server without any, the full model alone."""

    address: Address
    key: str | None
    model: str
    context: int | None  # tokens a request may have
    ladder: Ladder
    software: str

    @property
    def elastic(self) -> bool:
        return len(self.ladder) > 1

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One whole answer of /completions."""
        raw = json.dumps({"model": self.model, **body}).encode()
        return await ask(self.address, "POST", "/completions", self.key, raw, seconds=120.0)


async def find_target(url: str, key: str | None = None, model: str | None = None) -> Target:
    """Ask /v1/models. PrismError says in one line what is wrong with the address, the key or the name."""
    address = Address.parse(url)
    cards = (await ask(address, "GET", "/models", key)).get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards) or not cards:
        raise UsageError(f"{address.url}/models lists no model", "give the address of an OpenAI-compatible server")
    names = [str(card["id"]) for card in cards]
    if model is not None and model not in names:
        raise UsageError(f"no model '{model}' at {address.url}", f"choose one of: {', '.join(names)}")
    card = cards[names.index(model)] if model is not None else cards[0]
    context = card.get("max_model_len")
    return Target(
        address,
        key,
        str(card["id"]),
        context if isinstance(context, int) and context > 1 else None,
        _ladder(card.get("operating_points")),
        str(card.get("owned_by") or "unknown"),
    )


def _ladder(points: Any) -> Ladder:
    if not isinstance(points, list) or len(points) < 2:
        return PLAIN
    try:
        return Ladder(
            tuple(
                Level(str(p["name"]), OperatingPoint.from_json(p["point"]), float(p["slots"]), float(p["quality"]))
                for p in points
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PrismError(f"the server's operating points cannot be read: {type(error).__name__} {error}") from error


async def ask(
    address: Address, method: str, route: str, key: str | None, body: bytes = b"", seconds: float = 30.0
) -> dict[str, Any]:
    """A JSON object from the server. PrismError with one line for everything that can go wrong."""
    try:
        reader, content = await fetch(address, method, route, key, body, seconds)
    except TimeoutError as error:
        raise PrismError(f"no answer from {address.url} within {seconds:g} s", "is the server ready?") from error
    except OSError as error:
        raise PrismError(f"no server at {address.url}: {error.strerror or error}", "start one, or correct the address") from error
    except Broken as error:
        raise PrismError(f"{address.url} does not speak HTTP: {error}", "correct the address") from error
    _check(address, route, reader, content)
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{address.url}{route} is no OpenAI API", "give the address up to /v1")
    return found


def _check(address: Address, route: str, reader: ResponseReader, content: bytes) -> None:
    if reader.status in (401, 403):
        raise UsageError(f"{address.url} wants a key ({reader.status})", "give --api-key, or set MOE_PRISM_API_KEY")
    if reader.status == 404 and route == "/models":
        raise UsageError(f"{address.url}{route} is not there (404)", "give the address up to /v1")
    if reader.status != 200:
        raise PrismError(f"{address.url}{route} answered {reader.status}: {message(content)}", "see the server's log")


def message(content: bytes) -> str:
    """What an error body says, in one short line."""
    try:
        data = json.loads(content)
        error = data.get("error", data)
        text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = content.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200]

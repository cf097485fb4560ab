"""One upstream: whether it lives, which quality levels it has, and an answer of it up to its first bytes.

What comes from an upstream is untrusted: it is bounded in bytes and time, and read by a form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import httpx2
from annotated_types import MaxLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import UsageError
from .config import PoolBounds, UpstreamForm

logger = logging.getLogger(__name__)

LIST_BYTES, ERROR_BYTES = 1 << 20, 64 << 10
"""Of a list of models, and of an error."""
FULL = "full"
"""The one level of an upstream that lists none."""
THEIRS = frozenset({400, 405, 409, 413, 415, 422, 431})
"""Errors of the request itself: no other upstream would take it either."""
SHOWN = re.compile(r"[\x20-\x7e]{1,1024}")
"""What a header of theirs may hold to be passed on."""
PASSED = ("class", "levels", "point", "quality", "ignored")


class NoAnswer(Exception):
    """An upstream gave no answer. retry: seconds that it asked for."""

    def __init__(self, reason: str, *, retry: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry = reason, retry


class Refused(Exception):
    """An upstream says that the request itself is wrong. body: its answer, JSON."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class _Lax(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class ListedLevel(_Lax):
    """A quality level as `/v1/models` of our own server lists it. slots: what a token computes."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    quality: Annotated[float, Field(ge=0, le=1)]
    slots: Annotated[float, Field(ge=0, le=1e9)]


class ListedModel(_Lax):
    """A model of `/v1/models`."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    operating_points: Annotated[list[ListedLevel], MaxLen(1024)] = Field(default_factory=list)


class ModelList(_Lax):
    """`/v1/models`."""

    data: Annotated[list[ListedModel], MaxLen(4096)]


@dataclass
class Arrived:
    """An answer whose first bytes are here. kind: its content type; rest: what follows, to be read once."""

    kind: str
    headers: Mapping[str, str]
    first: bytes
    rest: AsyncIterator[bytes]
    response: httpx2.Response

    async def close(self) -> None:
        with contextlib.suppress(httpx2.HTTPError, RuntimeError):
            await self.response.aclose()


class Upstream:
    """Its state changes on the event loop alone."""

    def __init__(self, form: UpstreamForm, bounds: PoolBounds, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        """transport: of tests. UsageError where the variable of its key is not set."""
        self.form, self.bounds = form, bounds
        self.model: str | None = form.model
        self.levels: tuple[ListedLevel, ...] = ()
        self.is_ours = False
        self.up = False
        self.running = 0
        key = None if form.key_variable is None else os.environ.get(form.key_variable)
        if form.key_variable is not None and not key:
            raise UsageError(f"the variable {form.key_variable} of upstream '{form.name}' is not set", "export the key in it")
        self._headers = {"accept-encoding": "identity", "user-agent": "moe-prism-route"}
        self._headers |= {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(bounds.first_byte_seconds, connect=bounds.connect_seconds, pool=bounds.connect_seconds)
        limits = httpx2.Limits(max_connections=form.requests + 2, max_keepalive_connections=form.requests)
        self._client = httpx2.AsyncClient(
            timeout=timeout, limits=limits, headers=self._headers, follow_redirects=False, trust_env=False, transport=transport
        )

    @property
    def is_full(self) -> bool:
        return self.running >= self.form.requests

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self) -> None:
        """Ask which models it has, which also says whether it lives. Levels that were known stay while it is gone."""
        try:
            async with asyncio.timeout(max(self.bounds.connect_seconds, self.bounds.probe_seconds)):
                self._learn(ModelList.model_validate_json(await self._get("/models")))
        except (TimeoutError, httpx2.HTTPError, ValidationError, NoAnswer) as error:
            if self.up:
                logger.warning("upstream lost", extra={"fields": {"upstream": self.form.name, "why": type(error).__name__}})
            self.up = False
            return
        if not self.up:
            logger.info("upstream found", extra={"fields": {"upstream": self.form.name, "levels": len(self.levels)}})
        self.up = True

    async def _get(self, path: str) -> bytes:
        async with self._client.stream("GET", self.form.url + path) as response:
            if response.status_code != 200:
                raise NoAnswer(f"status {response.status_code}")
            return await _bounded(response.aiter_bytes(), LIST_BYTES)

    def _learn(self, listed: ModelList) -> None:
        wanted = self.form.model
        found = next((m for m in listed.data if wanted is None or m.id == wanted), None)
        if found is None:
            raise NoAnswer(f"it lists no model '{wanted}'" if listed.data else "it lists no model")
        levels = tuple(found.operating_points)
        self.is_ours = bool(levels)
        if self.form.levels is not None:
            levels = tuple(level for level in levels if level.name in self.form.levels)
        if self.is_ours and not levels:
            raise NoAnswer("it has none of the levels that the pool names")
        self.model, self.levels = found.id, levels or (ListedLevel(name=FULL, quality=1.0, slots=1.0),)

    async def open(self, path: str, body: bytes, passed: Mapping[str, str], until: float) -> Arrived:
        """Send a request and wait for the first bytes of its answer. NoAnswer where another upstream may do it, Refused where none would.

        passed: headers that go along; until: on the loop's clock.
        """
        loop = asyncio.get_running_loop()
        headers = {**self._headers, **passed, "content-type": "application/json"}
        request = self._client.build_request("POST", self.form.url + path, content=body, headers=headers)
        response: httpx2.Response | None = None
        try:
            async with asyncio.timeout_at(min(until, loop.time() + self.bounds.first_byte_seconds)):
                response = await self._client.send(request, stream=True)
                arrived = await self._begun(response)
        except TimeoutError:
            await _close(response)
            raise NoAnswer("slow") from None
        except httpx2.HTTPError as error:
            await _close(response)
            self.up = self.up and response is not None
            raise NoAnswer(type(error).__name__) from None
        except BaseException:
            await _close(response)
            raise
        return arrived

    async def _begun(self, response: httpx2.Response) -> Arrived:
        status = response.status_code
        if status in THEIRS:
            raise Refused(status, _object(await _bounded(response.aiter_bytes(), ERROR_BYTES)))
        if status != 200:
            retry = response.headers.get("retry-after", "")
            raise NoAnswer(f"status {status}", retry=min(int(retry), 3600) if retry.isdecimal() and len(retry) < 6 else None)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if (
            kind not in ("application/json", "text/event-stream")
            or response.headers.get("content-encoding", "identity") != "identity"
        ):
            raise NoAnswer("an answer of another type")
        rest = response.aiter_raw()
        first = b""
        async for first in rest:
            if first:
                break
        if not first:
            raise NoAnswer("an empty answer")
        shown = {f"x-moe-prism-{name}": response.headers.get(f"x-moe-prism-{name}") for name in PASSED}
        return Arrived(kind, {k: v for k, v in shown.items() if v and SHOWN.fullmatch(v)}, first, rest, response)

    async def whole(self, arrived: Arrived, until: float) -> bytes:
        """The rest of an answer that is not streamed, in one piece. NoAnswer where it ends early, is too large, or is no JSON object."""
        try:
            async with asyncio.timeout_at(until):
                body = await _bounded(arrived.rest, self.bounds.answer_bytes, arrived.first)
        except TimeoutError:
            raise NoAnswer("slow") from None
        except httpx2.HTTPError as error:
            raise NoAnswer(type(error).__name__) from None
        finally:
            await arrived.close()
        return _object(body)


async def _bounded(parts: AsyncIterator[bytes], most: int, first: bytes = b"") -> bytes:
    found = bytearray(first)
    async for part in parts:
        found += part
        if len(found) > most:
            break
    if len(found) > most:
        raise NoAnswer("an answer that is too large")
    return bytes(found)


def _object(body: bytes) -> bytes:
    """The same bytes, if they are a JSON object."""
    try:
        if isinstance(json.loads(body), dict):
            return body
    except (ValueError, RecursionError):
        pass
    raise NoAnswer("an answer that is no JSON object")


async def _close(response: httpx2.Response | None) -> None:
    if response is not None:
        with contextlib.suppress(httpx2.HTTPError, RuntimeError):
            await response.aclose()


def error_body(message: str) -> dict[str, Any]:
    """What a stream says where its upstream ended early."""
    return {"error": {"message": message, "type": "server_error", "param": None, "code": "upstream"}}

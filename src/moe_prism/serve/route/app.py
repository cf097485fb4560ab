"""The HTTP application of a router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ..http.admission import AtTheDoor
from ..http.errors import ERRORS, answer_errors
from ..http.guard import Guard, Keys
from ..http.manners import Manners, origins
from ..http.refusal import Refusal
from . import forward
from .metrics import RouteMetrics
from .options import PoolOptions
from .request import RouteRequest
from .turnstile import Turnstile
from .upstream import Upstream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolRouter:
    """What a route needs."""

    options: PoolOptions
    upstreams: Sequence[Upstream]
    metrics: RouteMetrics
    door: Turnstile

    async def look(self) -> None:
        """At all upstreams at once."""
        await asyncio.gather(*(upstream.look() for upstream in self.upstreams))
        self.options.refit()

    async def watch(self) -> None:
        """For ever: whatever goes wrong once, the next look comes."""
        while True:
            await asyncio.sleep(self.options.pool.form.bounds.probe_seconds)
            try:
                await self.look()
            except Exception:
                logger.exception("a look at the upstreams failed")


def create_router(router: PoolRouter, keys: Sequence[str] = (), allowed: Sequence[str] = ()) -> Guard:
    """The application behind its guard. keys: one is needed by every route but the probes. allowed: origins of pages that may ask."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await router.look()
        watching = asyncio.create_task(router.watch())
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            for upstream in router.upstreams:
                await upstream.close()

    app = FastAPI(
        title="moe-prism route", docs_url=None, redoc_url=None, responses=ERRORS, lifespan=lifespan, redirect_slashes=False
    )
    answer_errors(app)
    _about(app, router)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _route(router, request, "/completions")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _route(router, request, "/chat/completions")

    inner = origins(Manners(AtTheDoor(app, router.door), allowed), allowed)
    return Guard(inner, router.options.pool.form.bounds, Keys(keys), router.metrics.refuse)


async def _route(router: PoolRouter, request: Request, path: str) -> Response:
    try:
        data = await request.json()
    except (ValueError, RecursionError):
        raise Refusal(400, "body: it is no JSON", code="invalid_json") from None
    if not isinstance(data, dict):
        raise Refusal(400, "body: give a JSON object")
    asked = RouteRequest.of(data)
    return await forward.start(router.options, router.metrics, router.door, request, path, asked).run()


def _about(app: FastAPI, router: PoolRouter) -> None:
    """How the router is, and what it routes to."""
    options, started = router.options, int(time.time())

    @app.get("/health")
    async def health() -> Response:
        """The router lives. It is of no use without any upstream, which `/ready` says."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """New requests are taken, and some upstream lives."""
        up = any(upstream.up for upstream in router.upstreams)
        said = "draining" if router.door.leaving else "ready" if up else "no upstream"
        return JSONResponse({"status": said}, 200 if said == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def about() -> dict[str, str]:
        return {"version": version("moe-prism")}

    def card(name: str, mine: Sequence[int]) -> dict[str, Any]:
        used = set() if options.chooser is None else set(options.chooser.chosen())
        said = []
        for o in mine:
            each = options.every[o]
            facts = {"name": each.name, "quality": round(each.quality, 6), "cost": each.cost}
            said.append({**facts, "up": options.is_there(o), "used": o in used})
        return {"id": name, "object": "model", "created": started, "owned_by": "moe-prism", "options": said}

    def cards() -> list[dict[str, Any]]:
        every = range(len(options.every))
        own = {name: [o for o in every if options.every[o].model == name] for name in options.upstreams}
        at = [card(options.every[o].name, [o]) for o in every]
        return [card(options.pool.form.name, every), *(card(name, mine) for name, mine in own.items()), *at]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The pool, its models, and each of them at each of its levels."""
        return {"object": "list", "data": cards()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        found = next((each for each in cards() if each["id"] == name), None)
        if found is None:
            raise Refusal(404, f"there is no model '{name[:64]}'", param="model", code="model_not_found")
        return found

"""The HTTP application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from . import routes, status, tokens
from .adapters import SIGN, about_adapter, administer
from .admission import AtTheDoor
from .errors import ERRORS, answer_errors
from .guard import Guard, Keys
from .manners import Manners, origins
from .protocol import ChatRequest, CompletionRequest
from .routes import House

HUNG = 60.0  # seconds without a turn of the engine after which the server is not ready


@dataclass(frozen=True)
class Administration:
    """keys: of administrators, at least one; folder: of the adapters that they may load."""

    keys: Sequence[str]
    folder: Path


def create_app(
    house: House,
    history: status.History,
    keys: Sequence[str] = (),
    allowed: Sequence[str] = (),
    admin: Administration | None = None,
) -> Guard:
    """The application behind its guard. keys: one is needed by every route but probes and the status page, which holds no data.
    allowed: origins of pages that may ask. admin: who may load adapters; None: nobody.
    """
    service, door = house.service, house.door

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.engine.attach()
        try:
            yield
        finally:
            await service.engine.detach()

    app = FastAPI(title="moe-prism", docs_url=None, redoc_url=None, responses=ERRORS, lifespan=lifespan, redirect_slashes=False)
    answer_errors(app)
    _watching(app, house, history)
    _around(app, house)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await routes.completions(house, request, body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await routes.chat(house, request, body)

    salted = service.config.engine.prefix_cache_per_key
    if admin is not None:
        administer(app, service, admin.folder)
    inner = origins(Manners(AtTheDoor(app, door), allowed), allowed)
    administrators = None if admin is None else Keys(admin.keys)
    return Guard(inner, service.config.bounds, Keys(keys, salted=salted), service.metrics.refuse, administrators)


def _watching(app: FastAPI, house: House, history: status.History) -> None:
    """How the server is."""
    service, door = house.service, house.door

    @app.get("/health")
    async def health() -> Response:
        """The server lives, and its engine does or is being started again."""
        said = {"ready": "ok", "restarting": "engine restarting", "stopped": "engine stopped"}[service.engine.state]
        return JSONResponse({"status": said}, 503 if said == "engine stopped" else 200)

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        """New requests are taken. Probes carry no key: what the server does is for those who show one."""
        engine = service.engine
        status = "draining" if door.leaving else "ready" if engine.state == "ready" else f"engine {engine.state}"
        if status == "ready" and engine.clock() - engine.last_turn > HUNG:
            status = "engine hung"
        content: dict[str, Any] = {"status": status}
        if request.scope["moe_prism_known"]:
            content |= {"policy": engine.policy_name, "requests": door.requests}
        return JSONResponse(content, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        service.gauges()
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        """Whoever opens the server's address in a browser wants the page."""
        return RedirectResponse("/status")

    @app.get("/status", response_class=HTMLResponse)
    async def status_page() -> Response:
        """The live status page."""
        text, headers = status.page()
        return HTMLResponse(text, headers=headers)

    @app.get("/status.json")
    async def status_json() -> dict[str, Any]:
        """What the page draws."""
        return status.snapshot(service, door, history)


def _around(app: FastAPI, house: House) -> None:
    """What the model is, and its tokens."""
    service, started = house.service, int(time.time())

    def card(name: str, adapter: str = "") -> dict[str, Any]:
        points = [level.to_json() for level in service.ladder.levels]
        said = {"id": name, "object": "model", "created": started, "owned_by": "moe-prism", "root": service.name}
        parent = (
            {"parent": service.name, "adapter": about_adapter(service.engine.adapters[adapter])} if adapter else {"parent": None}
        )
        return {**said, **parent, "max_model_len": service.context, "operating_points": points}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Its plain name, its names at the quality of every level, and those of its adapters, for clients that choose from this list."""
        at = [f"{service.name}@{level.name}" for level in service.ladder.levels]
        tuned = [card(f"{service.name}{SIGN}{own}", own) for own in service.adapters]
        return {"object": "list", "data": [*(card(name) for name in (service.name, *at)), *tuned]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model by its name, also with a quality behind it."""
        return card(name, service.wish(CompletionRequest(prompt="", model=name)).adapter)

    @app.get("/version")
    async def about() -> dict[str, str]:
        return {"version": version("moe-prism")}

    @app.post("/tokenize")
    async def tokenize(body: tokens.TokenizeRequest) -> dict[str, Any]:
        return await tokens.tokenize(house, body)

    @app.post("/detokenize")
    async def detokenize(body: tokens.DetokenizeRequest) -> dict[str, Any]:
        return tokens.detokenize(house, body)

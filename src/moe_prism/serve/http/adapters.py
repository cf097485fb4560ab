"""Adapters over HTTP: their names among the models, and the routes by which an administrator loads and unloads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ...errors import PrismError, UsageError
from ...options.serve import ADAPTER_NAME, is_adapter_name
from ..backend import AdapterFacts
from .refusal import Refusal
from .service import Service

SIGN = ":"
"""Between a model's name and that of its adapter."""
LOOK = 0.05  # seconds between looks whether requests have ended


def about_adapter(own: AdapterFacts) -> dict[str, Any]:
    """What is told of one."""
    return {"name": own.name, "experts": own.experts, "bytes": own.bytes, "digest": own.digest}


class Shelf:
    """The folder whose adapters may be loaded. One change at a time."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.folder = service, folder
        self._turn = asyncio.Lock()

    @property
    def loaded(self) -> Mapping[str, AdapterFacts]:
        """By name."""
        return self.service.engine.adapters

    def _path(self, name: str) -> Path:
        """Of a folder directly inside. Refusal for a name that is none, or leads anywhere else."""
        if not is_adapter_name(name):
            raise Refusal(400, f"no name of an adapter: {ADAPTER_NAME}", param="name")
        root = self.folder.resolve()
        path = (root / name).resolve()
        if path.parent != root or not path.is_dir():
            raise Refusal(404, f"the folder of adapters has no '{name}'", code="adapter_not_found", param="name")
        return path

    async def load(self, name: str) -> AdapterFacts:
        """Requests may name it from now on."""
        async with self._turn:
            path = self._path(name)
            try:
                await self.service.engine.load_adapter(name, str(path))
            except UsageError as error:
                raise Refusal(409, f"{error.cause}; {error.next_step}", code="adapter_conflict", param="name") from error
            except PrismError as error:
                raise Refusal(400, f"{error.cause}", code="adapter_unreadable", param="name") from error
            return self.loaded[name]

    async def unload(self, name: str) -> None:
        """No new request may name it; once those that do have ended, its memory is free. 409 where they do not end in time."""
        async with self._turn:
            if name not in self.loaded:
                raise Refusal(404, "no adapter of that name is loaded", code="adapter_not_found", param="name")
            until = time.monotonic() + self.service.config.bounds.drain_seconds
            self.service.leaving.add(name)
            try:
                while self._users(name) and time.monotonic() < until:  # noqa: ASYNC110 - requests end in another thread or process
                    await asyncio.sleep(LOOK)
                await self.service.engine.unload_adapter(name)
            except PrismError as error:
                raise Refusal(409, f"{error.cause}; {error.next_step}", code="adapter_conflict", param="name") from error
            finally:
                self.service.leaving.discard(name)

    def _users(self, name: str) -> int:
        return sum(request.adapter == name for request in list(self.service.engine.book.values()))


def administer(app: FastAPI, service: Service, folder: Path) -> None:
    """The routes below /admin, which the guard opens for an administrator's key alone."""
    shelf = Shelf(service, folder)

    def admin(request: Request) -> None:
        if not request.scope.get("moe_prism_admin"):
            raise Refusal(401, "an administrator's key is needed", code="unauthorized")

    @app.get("/admin/adapters")
    async def loaded(request: Request) -> dict[str, Any]:
        """Those that are loaded, and the memory that they take."""
        admin(request)
        every = [about_adapter(own) for own in shelf.loaded.values()]
        return {"adapters": every, "bytes": sum(own["bytes"] for own in every)}

    @app.put("/admin/adapters/{name}")
    async def load(name: str, request: Request) -> Response:
        """Load the folder of that name."""
        admin(request)
        return JSONResponse(about_adapter(await shelf.load(name)), 201)

    @app.delete("/admin/adapters/{name}")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        """Take it out of memory."""
        admin(request)
        await shelf.unload(name)
        return {"name": name, "unloaded": True}

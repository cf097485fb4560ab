"""Replicas of the server behind Ray Serve, and so behind KubeRay: `MODEL=/path/to/elastic serve run deploy.ray.app:app`.

Each replica starts `moe-prism serve` on a port of its own of the loopback, and hands requests on to it, streams too. Ray decides how many
there are, on which machines, and asks each for its health. MOE_PRISM_API_KEY is the key of all of them; clients send it as they would
without Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

OWN = ("host", "content-length", "transfer-encoding", "connection")
"""Headers that belong to one connection."""
RAYS = "x-request-id"
"""Ray gives every request one, which goes on to the server, and puts it into the answer. The server's own would stand there twice."""


@serve.deployment(num_replicas=2, max_ongoing_requests=256, health_check_period_s=10, graceful_shutdown_timeout_s=75)
class Replica:
    """One server."""

    def __init__(self, model: str, arguments: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "moe_prism", "serve", model, "--port", "0", *arguments]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own interpreter
        assert self.child.stderr is not None
        for line in self.child.stderr:
            found = json.loads(line) if line.startswith("{") else {}
            if found.get("event") == "ready":
                break
        else:
            raise RuntimeError(f"moe-prism serve ended with {self.child.wait()}")
        threading.Thread(target=self._log, daemon=True).start()  # a pipe that nobody reads fills up
        self.url = found["url"].removesuffix("/v1")
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> aiohttp.ClientSession:
        """Made on Ray's event loop, which is not there yet when a replica is."""
        if self._client is None:
            self._client = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        return self._client

    def _log(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            sys.stderr.write(line)

    async def check_health(self) -> None:
        """Ray replaces a replica whose server does not live."""
        async with self.client.get(self.url + "/health", timeout=aiohttp.ClientTimeout(total=10)) as answer:
            answer.raise_for_status()

    async def __call__(self, request: Request) -> StreamingResponse:
        """Any request, and its answer as it comes. A client that leaves ends its request there too."""
        headers = [(name, value) for name, value in request.headers.items() if name not in OWN]
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        answer = await self.client.request(
            request.method, self.url + path, headers=headers, data=await request.body(), allow_redirects=False
        )

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.content.iter_any():
                    yield chunk
            finally:
                answer.close()

        kept = {name: value for name, value in answer.headers.items() if name.lower() not in (*OWN, RAYS)}
        return StreamingResponse(chunks(), answer.status, kept)

    def __del__(self) -> None:
        self.child.terminate()  # it drains
        self.child.wait(75)


app = Replica.bind(os.environ.get("MODEL", "/model"), tuple(os.environ.get("MOE_PRISM_ARGUMENTS", "").split()))

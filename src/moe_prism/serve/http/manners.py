"""What clients are used to and no route should have to know: HEAD, slashes at the end, JSON under another name, other origins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from .guard import App, Message, Receive, Send
from .refusal import Refusal

JSON_TOO = ("", "text/plain", "application/x-www-form-urlencoded")
"""What clients call JSON that do not say what they send; `curl -d` is one."""


def origins(app: App, allowed: Sequence[str]) -> App:
    """Lets pages of these origins ask and read answers; * is all of them."""
    if not allowed:
        return app
    headers = ["authorization", "content-type"]
    shown = [f"x-moe-prism-{name}" for name in ("class", "levels", "point", "quality", "ignored")]
    made: Any = CORSMiddleware(
        app, allow_origins=list(allowed), allow_methods=["GET", "POST"], allow_headers=headers, expose_headers=shown
    )
    return made  # type: ignore[no-any-return]


class Manners:
    """Wraps the routes."""

    def __init__(self, app: App, allowed: Sequence[str]) -> None:
        """allowed: origins of pages that may send."""
        self.app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked: dict[str, Any] = {**scope}
        asked["path"] = scope["path"].rstrip("/") or "/"
        if scope["method"] == "HEAD":
            asked["method"] = "GET"  # the server sends no body
        if scope["method"] == "POST":
            asked["headers"] = self._as_json(scope["headers"])
        await self.app(asked, receive, send)

    def _as_json(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """A page may send text/plain to anywhere without asking, so its origin must be one that is allowed."""
        found = dict(headers)
        kind = found.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind == "application/json" or kind.endswith("+json"):
            return headers
        origin = found.get(b"origin", b"").decode("latin-1")
        if kind not in JSON_TOO or (origin and not self._allowed & {origin, "*"}):
            raise Refusal(415, "send the body as application/json", code="unsupported_media_type")
        return [*((name, value) for name, value in headers if name != b"content-type"), (b"content-type", b"application/json")]

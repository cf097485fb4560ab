"""How a request is told that it is not done: OpenAI's error objects."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorBody


CODES = {
    400: "invalid_value",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    503: "unavailable",
    504: "deadline",
}
"""What a status is called where nobody says it better."""


class Refusal(Exception):
    """A request that is answered with an error. retry: seconds for Retry-After."""

    close = False
    """Whether the connection ends with the answer, because nobody can tell where the request ends."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry = status, message, param, retry
        self.code = code or CODES.get(status, "internal_error" if status >= 500 else "invalid_value")

    def body(self) -> dict[str, Any]:
        """The answer's JSON, in OpenAI's form."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        extra = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return {**extra, "retry-after": str(self.retry)} if self.retry is not None else extra

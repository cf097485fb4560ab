"""Every error of an application as OpenAI's clients expect it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from .refusal import ErrorAnswer, Refusal

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer} for code in (400, 401, 404, 405, 408, 413, 415, 429, 431, 503, 504)
}
"""For the schema: what routes may answer beside what they return."""


def answer_errors(app: FastAPI) -> None:
    """Every error is answered in OpenAI's form, and none says what the request held."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        refusal = _refusal(error.errors()[0])
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(ValidationError)
    async def invalid_part(request: Request, error: ValidationError) -> Response:
        first = error.errors()[0]
        refusal = _refusal({**first, "loc": ("body", *first["loc"])})
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse(Refusal(error.status_code, str(error.detail)).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return JSONResponse(Refusal(500, "an error inside the server").body(), 500)


def _refusal(found: Any) -> Refusal:
    """From pydantic's first error. Never the value: it is the prompt. Tags of unions are no identifiers, and so are left out."""
    place = ".".join(str(p) for p in found["loc"][1:] if isinstance(p, int) or p.isidentifier()).replace("kind", "class")
    code = {"missing": "missing_required_parameter", "json_invalid": "invalid_json"}.get(found["type"], "invalid_value")
    said = found["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{place or 'body'}: {said}"[:500], param=place[:100] or None, code=code)

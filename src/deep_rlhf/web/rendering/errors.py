"""Turns exceptions into responses of one sentence: a page for browsers, JSON for scripts."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from deep_rlhf.errors import LabelRefused, StoreDamaged, StoreError, StoreUnavailable
from deep_rlhf.web.access.headers import TOO_LARGE
from deep_rlhf.web.problem import Problem, wants_json
from deep_rlhf.web.rendering.templates import page, redirect

logger = logging.getLogger(__name__)

HTTP_ERRORS = {404: "Page not found.", 405: "This page does not accept that request method.", 413: TOO_LARGE}


def add_error_handlers(app: FastAPI) -> None:
    """Turns every exception into one sentence that reveals nothing internal."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        if error.status == 401 and not wants_json(request) and request.method == "GET":
            return redirect(request, "/login")
        return _refusal(request, error.status, str(error), error.headers)

    async def on_store_error(request: Request, error: Exception) -> Response:
        if isinstance(error, (StoreUnavailable, StoreDamaged)):
            logger.warning("%s", error)
            return _refusal(request, 503, error.shown)
        return _refusal(request, 409 if isinstance(error, LabelRefused) else 400, str(error))

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _refusal(request, 422, _first_error(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sentence = HTTP_ERRORS.get(error.status_code, "The request could not be read.")
        return _refusal(request, error.status_code, sentence)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(StoreError, on_store_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)


def _refusal(request: Request, status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    if wants_json(request):
        return JSONResponse({"error": sentence}, status_code=status, headers=headers)
    if not hasattr(request.state, "visitor"):
        return PlainTextResponse(sentence, status_code=status, headers=headers)
    response = page(request, "error.html", status=status, sentence=sentence)
    response.headers.update(headers or {})
    return response


def _first_error(errors: Sequence[Any]) -> str:
    first = errors[0]
    name = str(first["loc"][-1])
    if first["type"] == "missing":
        return f"'{name}' is missing."
    return f"'{name}' is not valid: {first['msg'][:1].lower()}{first['msg'][1:]}."

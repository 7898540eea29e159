"""How pages are made from templates, and how every refusal becomes one sentence: a page, or JSON for a script."""

import logging
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from deep_rlhf.errors import LabelRefused, StoreError, StoreUnavailable
from deep_rlhf.web.access.auth import Problem, Visitor
from deep_rlhf.web.access.security import TOO_LARGE, csrf_token
from deep_rlhf.web.progress.charts import mark
from deep_rlhf.web.rendering import markdown

logger = logging.getLogger(__name__)

DASH = "–"


def percent(value: float | None) -> str:
    """0.123 as 12%."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.0%}"


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def clock(moment: datetime | str | None) -> str:
    """A moment as people read it, in UTC."""
    try:
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    except ValueError:
        return DASH
    return moment.astimezone(UTC).strftime("%d %b %Y, %H:%M UTC") if moment else DASH


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("deep_rlhf.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "clock": clock,
        "markdown": markdown.render,
        "short": markdown.short,
    }
    environment.globals |= {"turns_of": markdown.turns_of, "mark": mark}
    return environment


_TEMPLATES = _environment()


def fragment(request: Request, template: str, /, **values: Any) -> str:
    """A part of a page as HTML; its forms carry the token of this browser, and the store that they are about."""
    visitor: Visitor = request.state.visitor
    return _TEMPLATES.get_template(template).render(
        csrf=csrf_token(visitor.session),
        store_id=request.app.state.store_id,
        person=visitor.person,
        accounts=visitor.has_account,
        **values,
    )


def page(request: Request, template: str, /, *, status: int = 200, **values: Any) -> Response:
    """A whole page. A browser that comes for the first time gets its cookie."""
    html = fragment(request, template, **values)
    # A sampled token can be half of a character: "replace" keeps it from costing the whole page.
    response = HTMLResponse(html.encode("utf-8", errors="replace"), status_code=status)
    request.state.visitor.keep(response)
    return response


def see(request: Request, address: str) -> Response:
    """Sends the browser to another page, after a form."""
    if "hx-request" in request.headers:
        return Response(status_code=204, headers={"HX-Redirect": address})
    return RedirectResponse(address, status_code=303)


def wants_json(request: Request) -> bool:
    """Whether a script asks, not a form."""
    return "application/json" in request.headers.get("accept", "")


def add_refusals(app: FastAPI) -> None:
    """Every error becomes one clear sentence, and none tells what is inside."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        if error.status == 401 and not wants_json(request) and request.method == "GET":
            return see(request, "/login")
        return _refusal(request, error.status, str(error), error.headers)

    async def on_store_error(request: Request, error: Exception) -> Response:
        if isinstance(error, StoreUnavailable):
            logger.warning("%s", error)
            return _refusal(request, 503, "The database does not answer now: try again in a moment.")
        return _refusal(request, 409 if isinstance(error, LabelRefused) else 400, str(error))

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _refusal(request, 422, _sentence(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sentence = {
            404: "There is no such page.",
            405: "This page does not take that kind of request.",
            413: TOO_LARGE,
        }
        return _refusal(request, error.status_code, sentence.get(error.status_code, "The request cannot be read."))

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


def _sentence(errors: Sequence[Any]) -> str:
    first = errors[0]
    name = str(first["loc"][-1])
    if first["type"] == "missing":
        return f"'{name}' is missing."
    return f"'{name}' cannot be read: {first['msg'][:1].lower()}{first['msg'][1:]}."

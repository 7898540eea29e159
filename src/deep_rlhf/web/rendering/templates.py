"""Renders pages and page fragments from templates."""

import math
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from deep_rlhf.web.access.auth import Visitor
from deep_rlhf.web.access.csrf import csrf_token
from deep_rlhf.web.progress.charts import mark
from deep_rlhf.web.rendering import markdown

DASH = "–"


def percent(value: float | None) -> str:
    """Formats 0.123 as 12%; a dash if there is no value."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.0%}"


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number with `digits` decimals; a dash if there is no value."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def clock(moment: datetime | str | None) -> str:
    """Formats a time in UTC; a dash if there is none."""
    try:
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        return moment.astimezone(UTC).strftime("%d %b %Y, %H:%M UTC") if moment else DASH
    except (ValueError, OverflowError):  # OverflowError: the first or last day of the calendar, in another zone
        return DASH


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
    """Renders a part of a page as HTML. Its forms carry this browser's CSRF token and the id of the store."""
    visitor: Visitor = request.state.visitor
    return _TEMPLATES.get_template(template).render(
        csrf=csrf_token(visitor.session),
        store_id=request.app.state.store_id,
        person=visitor.person,
        accounts=visitor.has_account,
        **values,
    )


def page(request: Request, template: str, /, *, status: int = 200, **values: Any) -> Response:
    """Renders a whole page; sets the session cookie of a new browser."""
    html = fragment(request, template, **values)
    # A sampled token can be half a character, which UTF-8 cannot encode.
    response = HTMLResponse(html.encode("utf-8", errors="replace"), status_code=status)
    request.state.visitor.keep(response)
    return response


def redirect(request: Request, address: str) -> Response:
    """Redirects the browser to another page, also after a form or an htmx request."""
    if "hx-request" in request.headers:
        return Response(status_code=204, headers={"HX-Redirect": address})
    return RedirectResponse(address, status_code=303)

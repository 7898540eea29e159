"""The second tab: how the model changes, and the red button."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Form, Query
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deep_rlhf.feedback.state import STOP, StopRequest
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import Person, Visitor
from deep_rlhf.web.access.gate import Admin, Known
from deep_rlhf.web.progress import view
from deep_rlhf.web.rendering.templates import fragment, page, see

Version = Annotated[str, Query(pattern="^[0-9]{0,9}$")]


def model_routes(store: Store) -> APIRouter:
    """The routes of the second tab."""
    router = APIRouter()
    metrics = view.Metrics(store)

    @router.get("/model")
    def show(request: Request, first: Version = "", second: Version = "") -> Response:
        person: Person | None = request.state.visitor.person
        if person is None:
            return see(request, "/login")
        versions = view.compared(store, _number(first), _number(second))
        live = view.now(store) | view.figures(store, metrics) | view.history(store, **_rights(request))
        return page(request, "model.html", tab="model", live=live, versions=versions)

    @router.get("/model/now")
    def now(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "now.html", live=view.now(store)))

    @router.get("/model/figures")
    def figures(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "figures.html", live=view.figures(store, metrics)))

    @router.get("/model/history")
    def history(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "history.html", live=view.history(store, **_rights(request))))

    @router.get("/model/answers")
    def answers(request: Request, person: Known, until: Version = "") -> Response:
        found = view.answers(store, until=_number(until), **_rights(request))
        return page(request, "answers.html", tab="model", live=found)

    @router.get("/model/versions")
    def versions(request: Request, person: Known, first: Version = "", second: Version = "") -> Response:
        found = view.compared(store, _number(first), _number(second))
        return HTMLResponse(fragment(request, "versions.html", versions=found))

    @router.post("/stop")
    def stop(request: Request, admin: Admin, sure: Annotated[bool, Form()] = False) -> Response:
        if sure:
            STOP.write(store, StopRequest(by=admin.name, at=datetime.now(UTC)))
        return see(request, "/model")

    return router


def _rights(request: Request) -> dict[str, bool]:
    visitor: Visitor = request.state.visitor
    admin = visitor.person is not None and visitor.person.role == "admin"
    return {"admin": admin, "accounts": visitor.has_account}


def _number(version: str) -> int | None:
    return int(version) if version else None

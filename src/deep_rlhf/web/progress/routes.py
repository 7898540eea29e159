"""Routes of the model tab: how the model changes, and the stop button."""

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
from deep_rlhf.web.rendering.templates import fragment, page, redirect

NumberOrEmpty = Annotated[str, Query(pattern="^[0-9]{0,9}$")]


def model_routes(store: Store) -> APIRouter:
    """Builds the routes of the model tab."""
    router = APIRouter()
    metrics = view.Metrics(store)

    @router.get("/model")
    def show(request: Request, first: NumberOrEmpty = "", second: NumberOrEmpty = "") -> Response:
        person: Person | None = request.state.visitor.person
        if person is None:
            return redirect(request, "/login")
        versions = view.compare_versions(store, _number(first), _number(second))
        live = (
            view.loop_status(store) | view.key_figures(store, metrics) | view.label_history(store, **_rights(request))
        )
        return page(request, "model.html", tab="model", live=live, versions=versions)

    @router.get("/model/status")
    def status(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "status.html", live=view.loop_status(store)))

    @router.get("/model/figures")
    def figures(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "figures.html", live=view.key_figures(store, metrics)))

    @router.get("/model/history")
    def history(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "label_history.html", live=view.label_history(store, **_rights(request))))

    @router.get("/model/labels")
    def labels(request: Request, person: Known, until: NumberOrEmpty = "") -> Response:
        found = view.labels_page(store, until=_number(until), **_rights(request))
        return page(request, "labels.html", tab="model", live=found)

    @router.get("/model/versions")
    def versions(request: Request, person: Known, first: NumberOrEmpty = "", second: NumberOrEmpty = "") -> Response:
        compared = view.compare_versions(store, _number(first), _number(second))
        return HTMLResponse(fragment(request, "versions.html", versions=compared))

    @router.post("/stop")
    def stop(request: Request, admin: Admin, sure: Annotated[bool, Form()] = False) -> Response:
        if sure:
            STOP.write(store, StopRequest(by=admin.name, at=datetime.now(UTC)))
        return redirect(request, "/model")

    return router


def _rights(request: Request) -> dict[str, bool]:
    visitor: Visitor = request.state.visitor
    admin = visitor.person is not None and visitor.person.role == "admin"
    return {"admin": admin, "accounts": visitor.has_account}


def _number(text: str) -> int | None:
    return int(text) if text else None

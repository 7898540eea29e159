"""Routes of the labelling tab. Every form works without scripts; a script gets JSON instead of a page."""

import time
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from deep_rlhf.feedback.records import MOST_RESPONSES, Choice
from deep_rlhf.feedback.state import STATUS, Status
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import Person
from deep_rlhf.web.access.cookies import new_token
from deep_rlhf.web.access.csrf import is_csrf_token
from deep_rlhf.web.access.gate import Known
from deep_rlhf.web.labelling.view import held_questions, progress_of, question_html
from deep_rlhf.web.problem import Problem, wants_json
from deep_rlhf.web.rendering.templates import fragment, page, redirect

AHEAD = 2  # questions leased to a user: the one on the screen, and the next
MAX_HELD = 12
MAX_SECONDS = 3600.0  # per label; a longer time means that the annotator was away
OUTDATED = {"X-Page": "outdated"}  # tells the script to reload the page

Number = Annotated[int, Form(ge=1, le=2**62)]
Token = Annotated[str, Form(min_length=1, max_length=200)]
StoreId = Annotated[str, Form(max_length=100)]
Have = Annotated[str, Form(max_length=400)]  # ids of the questions that the browser has
Want = Annotated[int, Form(ge=0, le=MAX_HELD)]  # number of questions that it should have


async def same_store(request: Request, store_id: StoreId) -> None:
    """Raises Problem for a form of another store's page, where the same numbers are other questions."""
    check_store(request, store_id)


def check_store(request: Request, store_id: str) -> None:
    """Raises Problem if this is not the id of the served store."""
    if store_id != request.app.state.store_id:
        raise Problem(409, "This page belongs to another store than the one that is served now.", OUTDATED)


def label_routes(store: Store) -> APIRouter:
    """Builds the routes of the labelling tab."""
    router = APIRouter()

    @router.get("/")
    def show(request: Request) -> Response:
        person: Person | None = request.state.visitor.person
        if person is None:
            return redirect(request, "/login")
        shown = [question_html(request, question) for question in store.ask(person.name, count=AHEAD)]
        progress = progress_of(store, person.name)
        status = STATUS.read(store) or Status()
        preparing = status.text if status.state == "pretraining" else None
        return page(
            request,
            "label.html",
            tab="label",
            shown=shown,
            token=new_token(),
            progress=progress,
            preparing=preparing,
        )

    @router.get("/questions")
    def questions(
        request: Request,
        person: Known,
        have: Annotated[str, Query(max_length=400)] = "",
        want: Annotated[int, Query(ge=1, le=MAX_HELD)] = AHEAD,
        store_id: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Response:
        if store_id is not None:
            check_store(request, store_id)
        # Each login has its own token; a page opened before the login shows another user's name.
        token = request.headers.get("x-csrf-token")
        if token is not None and not is_csrf_token(token, request.state.visitor.session):
            raise Problem(409, "Another user has logged in since this page was opened.", OUTDATED)
        return JSONResponse(held_questions(request, store, person, _question_ids(have), want))

    @router.get("/progress")
    def progress(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "progress.html", progress=progress_of(store, person.name)))

    _add_label_routes(router, store)
    return router


def _add_label_routes(router: APIRouter, store: Store) -> None:
    """Adds the routes that record labels, skips and undos."""
    of_this_store = [Depends(same_store)]

    @router.post("/answer", dependencies=of_this_store)
    def answer(
        request: Request,
        person: Known,
        question: Number,
        token: Token,
        choice: Annotated[Choice | None, Form()] = None,
        strength: Annotated[str, Form(pattern="^[1-4]?$")] = "",
        seconds: Annotated[float | None, Form(ge=0, allow_inf_nan=False)] = None,
        shown_at: Annotated[float, Form(ge=0, allow_inf_nan=False)] = 0.0,
        have: Have = "",
        want: Want = AHEAD,
    ) -> Response:
        taken = time.time() - shown_at if seconds is None else seconds
        event = store.add_label(
            question,
            person.name,
            token=token,
            choice=choice,
            ranks=ranks_of(request.state.form) if choice is None else None,
            strength=int(strength) if strength and choice in ("a", "b") else None,
            seconds=min(max(taken, 0.0), MAX_SECONDS),
        )
        return reply(request, person, have, want, {"event": event})

    @router.post("/skip", dependencies=of_this_store)
    def skip(
        request: Request, person: Known, question: Number, token: Token, have: Have = "", want: Want = AHEAD
    ) -> Response:
        event = store.skip(question, person.name, token=token)
        return reply(request, person, have, want, {"event": event})

    @router.post("/undo", dependencies=of_this_store)
    def undo(request: Request, person: Known, token: Token, have: Have = "", want: Want = AHEAD) -> Response:
        number = store.undo(person.name, token=token)
        return reply(request, person, have, want, {"undone": number})

    def reply(request: Request, person: Person, have: str, want: int, result: dict[str, Any]) -> Response:
        if not wants_json(request):
            return redirect(request, "/")
        known = _question_ids(have)
        if len(known) >= want:
            return JSONResponse(result | {"held": None, "questions": []})
        return JSONResponse(result | held_questions(request, store, person, known, want))


def ranks_of(form: FormData) -> list[int]:
    """Reads the ranks from a form, in the order of the comparison's responses; 2, 5, 5 becomes 1, 2, 2.

    Raises Problem for a missing rank or one that is not a digit from 1 to 9.
    """
    given = [form.get(f"rank_{index}") for index in range(MOST_RESPONSES)]
    given = given[: max((index + 1 for index, rank in enumerate(given) if rank is not None), default=0)]
    ranks = [int(rank) if isinstance(rank, str) and rank in "123456789" and len(rank) == 1 else 0 for rank in given]
    if not ranks:
        raise Problem(422, "The form has neither a choice nor ranks.")
    if 0 in ranks:
        raise Problem(422, f"Every response needs a rank from 1 (best) to {len(ranks)}.")
    places = sorted(set(ranks))
    return [places.index(rank) + 1 for rank in ranks]


def _question_ids(have: str) -> Collection[int]:
    return {int(word) for word in have.split(",")[:MAX_HELD] if word.isascii() and word.isdigit() and len(word) < 19}

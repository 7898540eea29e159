"""The first tab: questions to a person and his answers. Each form works alone; a script gets JSON instead of a page."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query
from markupsafe import Markup
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from deep_rlhf.feedback.records import MOST_ANSWERS, Choice, Question
from deep_rlhf.feedback.state import ANNOTATORS, STATUS, Status
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import Person, Problem, new_token
from deep_rlhf.web.access.gate import Known
from deep_rlhf.web.access.security import is_csrf_token
from deep_rlhf.web.rendering.markdown import render
from deep_rlhf.web.rendering.templates import fragment, page, see, wants_json

AHEAD = 2  # questions that a person holds: the one on the screen, and the next
MOST_HELD = 12
LONGEST_ANSWER = 3600.0  # seconds; whoever takes longer was away
LETTERS = "AB"
OUTDATED = {"X-Page": "outdated"}  # tells the script that only a new page helps
STRENGTH_WORDS = {1: "slightly", 2: "clearly", 3: "much", 4: "far"}

Number = Annotated[int, Form(ge=1, le=2**62)]
Token = Annotated[str, Form(min_length=1, max_length=200)]
StoreId = Annotated[str, Form(max_length=100)]
Have = Annotated[str, Form(max_length=400)]  # ids of the questions that the browser has already
Want = Annotated[int, Form(ge=0, le=MOST_HELD)]  # how many it shall hold then


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer in its place on the screen."""

    index: int  # among the comparison's answers
    name: str  # A and B, or 1, 2, 3 …
    html: Markup

    @property
    def choice(self) -> Choice:
        """What it means in a pair to like this one better."""
        return "a" if self.index == 0 else "b"


async def same_store(request: Request, store_id: StoreId) -> None:
    """Raises Problem for a form of a page on another store: the same numbers are other questions there."""
    check_store(request, store_id)


def check_store(request: Request, store_id: str) -> None:
    """Raises Problem where this is not the store that is served."""
    if store_id != request.app.state.store_id:
        raise Problem(409, "This page belongs to another store than the one that is served now.", OUTDATED)


def label_routes(store: Store) -> APIRouter:
    """The routes of the first tab."""
    router = APIRouter()

    @router.get("/")
    def show(request: Request) -> Response:
        person: Person | None = request.state.visitor.person
        if person is None:
            return see(request, "/login")
        shown = [_html(request, question) for question in store.ask(person.name, count=AHEAD)]
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
        want: Annotated[int, Query(ge=1, le=MOST_HELD)] = AHEAD,
        store_id: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Response:
        if store_id is not None:
            check_store(request, store_id)
        # Each login has a token of its own: a page that was opened before shows another person's name.
        token = request.headers.get("x-csrf-token")
        if token is not None and not is_csrf_token(token, request.state.visitor.session):
            raise Problem(409, "Somebody logged in after this page was opened.", OUTDATED)
        return JSONResponse(_more(request, store, person, _numbers(have), want))

    @router.get("/progress")
    def progress(request: Request, person: Known) -> Response:
        return HTMLResponse(fragment(request, "progress.html", progress=progress_of(store, person.name)))

    _add_answers(router, store)
    return router


def _add_answers(router: APIRouter, store: Store) -> None:
    """The routes by which a person says something."""
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
        event = store.answer(
            question,
            person.name,
            token=token,
            choice=choice,
            ranks=ranks_of(request.state.form) if choice is None else None,
            strength=int(strength) if strength and choice in ("a", "b") else None,
            seconds=min(max(taken, 0.0), LONGEST_ANSWER),
        )
        return done(request, person, have, want, {"event": event})

    @router.post("/skip", dependencies=of_this_store)
    def skip(
        request: Request, person: Known, question: Number, token: Token, have: Have = "", want: Want = AHEAD
    ) -> Response:
        event = store.skip(question, person.name, token=token)
        return done(request, person, have, want, {"event": event})

    @router.post("/undo", dependencies=of_this_store)
    def undo(request: Request, person: Known, token: Token, have: Have = "", want: Want = AHEAD) -> Response:
        number = store.undo(person.name, token=token)
        return done(request, person, have, want, {"undone": number})

    def done(request: Request, person: Person, have: str, want: int, said: dict[str, Any]) -> Response:
        if not wants_json(request):
            return see(request, "/")
        known = _numbers(have)
        if len(known) >= want:
            return JSONResponse(said | {"held": None, "questions": []})
        return JSONResponse(said | _more(request, store, person, known, want))


def ranks_of(form: FormData) -> list[int]:
    """The ranks in a form, by the answers' numbers in the comparison; 2, 5, 5 becomes 1, 2, 2. Raises Problem."""
    given = [form.get(f"rank_{index}") for index in range(MOST_ANSWERS)]
    given = given[: max((index + 1 for index, rank in enumerate(given) if rank is not None), default=0)]
    ranks = [int(rank) if isinstance(rank, str) and rank in "123456789" and len(rank) == 1 else 0 for rank in given]
    if not ranks:
        raise Problem(422, "An answer is missing.")
    if 0 in ranks:
        raise Problem(422, f"Each answer gets a rank from 1, the best, to {len(ranks)}.")
    places = sorted(set(ranks))
    return [places.index(rank) + 1 for rank in ranks]


def progress_of(store: Store, name: str) -> dict[str, Any]:
    """How a person is getting on."""
    annotators = ANNOTATORS.read(store) or []
    figures = next((one for one in annotators if one.name == name), None)
    return {
        "answered": store.answered(name),
        "waiting": store.waiting(),
        "pace": store.pace(name),
        "figures": figures,
        "alone": len(annotators) < 2,
    }


def shown_answers(question: Question) -> list[ShownAnswer]:
    """The answers as they lie on the screen, from left to right."""
    names = LETTERS if len(question.shown_order) == 2 else [str(place + 1) for place in range(MOST_ANSWERS)]
    return [
        ShownAnswer(index, name, render(question.comparison.answers[index]))
        for name, index in zip(names, question.shown_order, strict=False)
    ]


def _html(request: Request, question: Question) -> Markup:
    html = fragment(
        request,
        "question.html",
        question=question,
        answers=shown_answers(question),
        token=new_token(),
        shown_at=f"{time.time():.3f}",
        strengths=STRENGTH_WORDS,
    )
    return Markup(html)


def _more(request: Request, store: Store, person: Person, known: Collection[int], want: int) -> dict[str, Any]:
    """The questions that this person holds; with HTML those that his browser does not have yet."""
    held = store.ask(person.name, count=want)
    return {
        "held": [question.id for question in held],
        "questions": [
            {"id": question.id, "html": _html(request, question)} for question in held if question.id not in known
        ],
    }


def _numbers(have: str) -> Collection[int]:
    return {int(word) for word in have.split(",")[:MOST_HELD] if word.isascii() and word.isdigit() and len(word) < 19}

"""What the labelling tab shows: questions as HTML, and an annotator's progress."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from starlette.requests import Request

from deep_rlhf.feedback.records import MOST_RESPONSES, Choice, Question
from deep_rlhf.feedback.state import ANNOTATORS
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import Person
from deep_rlhf.web.access.cookies import new_token
from deep_rlhf.web.rendering.markdown import render
from deep_rlhf.web.rendering.templates import fragment

LETTERS = "AB"
STRENGTH_WORDS = {1: "slightly", 2: "clearly", 3: "much", 4: "far"}


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response at its position on the screen."""

    index: int  # within the comparison
    name: str  # A and B, or 1, 2, 3 …
    html: Markup

    @property
    def choice(self) -> Choice:
        """The choice that prefers this response of a pair."""
        return "a" if self.index == 0 else "b"


def shown_responses(question: Question) -> list[ShownResponse]:
    """The responses of a question in the order of the screen, from left to right."""
    names = LETTERS if len(question.shown_order) == 2 else [str(place + 1) for place in range(MOST_RESPONSES)]
    return [
        ShownResponse(index, name, render(question.comparison.responses[index]))
        for name, index in zip(names, question.shown_order, strict=False)
    ]


def question_html(request: Request, question: Question) -> Markup:
    """Renders a question with its form."""
    html = fragment(
        request,
        "question.html",
        question=question,
        responses=shown_responses(question),
        token=new_token(),
        shown_at=f"{time.time():.3f}",
        strengths=STRENGTH_WORDS,
    )
    return Markup(html)


def held_questions(request: Request, store: Store, person: Person, known: Collection[int], want: int) -> dict[str, Any]:
    """Leases up to `want` questions; returns their ids, and the HTML of those that are not in `known`."""
    held = store.ask(person.name, count=want)
    return {
        "held": [question.id for question in held],
        "questions": [
            {"id": question.id, "html": question_html(request, question)}
            for question in held
            if question.id not in known
        ],
    }


def progress_of(store: Store, name: str) -> dict[str, Any]:
    """An annotator's counts, pace and reliability."""
    annotators = ANNOTATORS.read(store) or []
    return {
        "labelled": store.labelled(name),
        "waiting": store.waiting(),
        "pace": store.pace(name),
        "figures": next((figures for figures in annotators if figures.name == name), None),
        "alone": len(annotators) < 2,
    }

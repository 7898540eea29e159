"""What each request passes before its route: who is it, not too often, and is a form really ours."""

import math
from typing import Annotated

from fastapi import Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from deep_rlhf.web.access.auth import SAFE_METHODS, Accounts, Person, Problem, Visitor
from deep_rlhf.web.access.security import RateLimit, client_of, is_csrf_token, is_own_origin
from deep_rlhf.web.settings import WebSettings

# Requests per second, and how many at once.
PEOPLE = (20, 100)  # a fast one sends one or two
STRANGERS = (20, 300)  # by address, which a whole office may share
LOGINS_FROM_ADDRESS = (1 / 6, 8)
LOGINS_TO_ACCOUNT = (1 / 6, 20)  # from wherever
FORM = "application/x-www-form-urlencoded"


class Gate:
    """A dependency of every route, so that none can forget it; leaves `visitor` and `accounts` in `request.state`."""

    def __init__(self, accounts: Accounts, settings: WebSettings) -> None:
        self.accounts, self.settings = accounts, settings
        self._people, self._strangers = RateLimit(*PEOPLE), RateLimit(*STRANGERS)
        self._addresses, self._names = RateLimit(*LOGINS_FROM_ADDRESS), RateLimit(*LOGINS_TO_ACCOUNT)

    async def __call__(self, request: Request) -> None:
        """Raises Problem for a request that is not let in."""
        visitor = await run_in_threadpool(self.accounts.visitor, request)
        request.state.visitor, request.state.accounts = visitor, self.accounts
        client = client_of(request, self.settings)
        if visitor.person is None:
            _refuse_if(self._strangers.wait(client))
        else:
            # Without logins all people have this machine's address, and names are free.
            _refuse_if(self._people.wait(visitor.person.name if visitor.has_account else visitor.session))
        if request.method not in SAFE_METHODS:
            await self._check_form(request, visitor)

    def check_login(self, request: Request, name: str) -> None:
        """Raises Problem for somebody who tries passwords."""
        _refuse_if(self._addresses.wait(client_of(request, self.settings)))
        _refuse_if(self._names.wait(name.strip()[:100]))

    async def _check_form(self, request: Request, visitor: Visitor) -> None:
        if not request.headers.get("content-type", "").lower().startswith(FORM):
            raise Problem(415, f"A form is sent as {FORM}.")
        form = await request.form()
        token = request.headers.get("x-csrf-token") or form.get("csrf")
        if not is_own_origin(request, self.settings) or not is_csrf_token(token, visitor.session):
            raise Problem(403, "This form is too old, or of another page: load the page again.")
        request.state.form = form


def _refuse_if(seconds: float) -> None:
    if seconds > 0:
        sentence = "That is too much at once: wait a moment."
        raise Problem(429, sentence, {"Retry-After": str(math.ceil(seconds))})


# async, though they wait for nothing: FastAPI would use a thread for each, which takes longer than they do.
async def known_person(request: Request) -> Person:
    """Who asks. Raises Problem if nobody knows."""
    person: Person | None = request.state.visitor.person
    if person is None:
        raise Problem(401, "Log in first.")
    return person


async def known_admin(request: Request) -> Person:
    """The administrator who asks. Raises Problem for anybody else."""
    person = await known_person(request)
    if person.role != "admin":
        raise Problem(403, "Only an administrator may do this.")
    return person


Known = Annotated[Person, Depends(known_person)]
Admin = Annotated[Person, Depends(known_admin)]

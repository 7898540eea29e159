"""What each request passes before its route: who is it, not too often, and is a form really ours."""

import math
from typing import Annotated

from fastapi import Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from deep_rlhf.web.auth import Accounts, Person, Problem, Visitor
from deep_rlhf.web.security import RateLimit, client_of, is_csrf_token, is_own_origin
from deep_rlhf.web.settings import WebSettings

SAFE_METHODS = ("GET", "HEAD")
FORM = "application/x-www-form-urlencoded"


class Gate:
    """A dependency of every route, so that none can forget it; leaves `request.state.visitor`."""

    def __init__(self, accounts: Accounts, settings: WebSettings) -> None:
        self.accounts, self.settings = accounts, settings
        self._people = RateLimit(per_second=20, burst=100)  # a fast person sends one or two
        self._strangers = RateLimit(per_second=20, burst=300)  # a whole office may have one address
        self._logins = RateLimit(per_second=1 / 6, burst=8)  # by address
        self._names = RateLimit(per_second=1 / 6, burst=20)  # by account, from wherever

    async def __call__(self, request: Request) -> None:
        """Raises Problem for a request that is not let in."""
        visitor = await run_in_threadpool(self.accounts.visitor, request)
        request.state.visitor = visitor
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
        _refuse_if(self._logins.wait(client_of(request, self.settings)))
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

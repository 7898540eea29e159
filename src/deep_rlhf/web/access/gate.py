"""Checks before each route: authentication, rate limits and forged forms."""

import math
from typing import Annotated

from fastapi import Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from deep_rlhf.web.access.auth import SAFE_METHODS, Accounts, Person, Visitor
from deep_rlhf.web.access.client_address import client_address
from deep_rlhf.web.access.csrf import is_csrf_token, is_own_origin
from deep_rlhf.web.access.rate_limit import RateLimit
from deep_rlhf.web.problem import Problem
from deep_rlhf.web.settings import WebSettings

# Rate limits: requests per second, and the burst.
PEOPLE = (20, 100)  # by user; a fast one sends one or two per second
STRANGERS = (20, 300)  # by address, which a whole office may share
LOGINS_FROM_ADDRESS = (1 / 6, 8)
LOGINS_TO_ACCOUNT = (1 / 6, 20)  # from all addresses together
# Strangers who know a name must not keep its owner out, so these two do not count against LOGINS_TO_ACCOUNT:
FIRST_LOGIN = (1 / 600, 1)  # the first from an address to an account
LOGINS_FROM_BROWSER = (1 / 6, 8)  # from a browser that the owner has logged in with before
FORM = "application/x-www-form-urlencoded"


class Gate:
    """A dependency of every route, so that none can omit it; sets `visitor` and `accounts` in `request.state`."""

    def __init__(self, accounts: Accounts, settings: WebSettings) -> None:
        self.accounts, self.settings = accounts, settings
        self._people, self._strangers = RateLimit(*PEOPLE), RateLimit(*STRANGERS)
        self._addresses, self._names = RateLimit(*LOGINS_FROM_ADDRESS), RateLimit(*LOGINS_TO_ACCOUNT)
        self._first, self._browsers = RateLimit(*FIRST_LOGIN), RateLimit(*LOGINS_FROM_BROWSER)

    async def __call__(self, request: Request) -> None:
        """Raises Problem for a request that is refused."""
        visitor = await run_in_threadpool(self.accounts.visitor, request)
        request.state.visitor, request.state.accounts = visitor, self.accounts
        if visitor.person is None:
            _refuse_if(self._strangers.wait(client_address(request, self.settings)))
        else:
            # Without logins all users share this machine's address, and anybody may take any name.
            _refuse_if(self._people.wait(visitor.person.name if visitor.has_account else visitor.session))
        if request.method not in SAFE_METHODS:
            await self._check_form(request, visitor)

    def check_login(self, request: Request, name: str) -> None:
        """Raises Problem for a client that guesses passwords."""
        account, address = name.strip()[:100], client_address(request, self.settings)
        if self.accounts.is_known_browser(request, name):
            _refuse_if(self._browsers.wait(account))
            return
        _refuse_if(self._addresses.wait(address))
        is_first = self._first.wait(f"{address} {account}") == 0
        wait = self._names.wait(account)
        _refuse_if(0 if is_first else wait)

    async def _check_form(self, request: Request, visitor: Visitor) -> None:
        if not request.headers.get("content-type", "").lower().startswith(FORM):
            raise Problem(415, f"Forms must be sent as {FORM}.")
        form = await request.form()
        token = request.headers.get("x-csrf-token") or form.get("csrf")
        if not is_own_origin(request, self.settings) or not is_csrf_token(token, visitor.session):
            raise Problem(403, "This form is outdated or comes from another page: reload the page.")
        request.state.form = form


def _refuse_if(seconds: float) -> None:
    if seconds > 0:
        raise Problem(429, "Too many requests; try again shortly.", {"Retry-After": str(math.ceil(seconds))})


# async although they await nothing: FastAPI would run a plain function in a thread, which takes longer than the check.
async def known_person(request: Request) -> Person:
    """The user who sent the request. Raises Problem if there is none."""
    person: Person | None = request.state.visitor.person
    if person is None:
        raise Problem(401, "Log in first.")
    return person


async def known_admin(request: Request) -> Person:
    """The administrator who sent the request. Raises Problem for any other user."""
    person = await known_person(request)
    if person.role != "admin":
        raise Problem(403, "Only an administrator may do this.")
    return person


Known = Annotated[Person, Depends(known_person)]
Admin = Annotated[Person, Depends(known_admin)]

"""Routes: logging in and out, and the local user's name."""

from typing import Annotated

from fastapi import APIRouter, Form
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from deep_rlhf.web.access.auth import Accounts
from deep_rlhf.web.access.cookies import set_name_cookie
from deep_rlhf.web.access.gate import Gate
from deep_rlhf.web.problem import Problem
from deep_rlhf.web.rendering.templates import page, redirect

DEFAULT_NAME = "me"

Text = Annotated[str, Form()]


def account_routes(accounts: Accounts, gate: Gate) -> APIRouter:
    """Builds the routes of user accounts."""
    router = APIRouter()

    @router.get("/login")
    def show_login(request: Request) -> Response:
        if request.state.visitor.person is not None:
            return redirect(request, "/")
        if not accounts.need_login():
            return page(request, "name.html", default=DEFAULT_NAME)
        return page(request, "login.html", name="", problem=None, has_token=accounts.settings.token is not None)

    @router.post("/login")
    def log_in(request: Request, name: Text, password: Text) -> Response:
        gate.check_login(request, name)
        response = RedirectResponse("/", status_code=303)
        if accounts.log_in(request.state.visitor, name, password, response):
            return response
        has_token = accounts.settings.token is not None
        problem = "Wrong name or password."
        return page(request, "login.html", status=403, name=name[:200], problem=problem, has_token=has_token)

    @router.post("/name")
    def set_name(request: Request, name: Text) -> Response:
        response = RedirectResponse("/", status_code=303)
        if not accounts.need_login():
            if not (name := name.strip()):
                raise Problem(422, "'name' is missing.")  # the same sentence as for an empty field
            set_name_cookie(response, name, secure=request.state.visitor.secure)
        return response

    @router.post("/logout")
    def log_out(request: Request) -> Response:
        response = RedirectResponse("/login", status_code=303)
        accounts.log_out(request.state.visitor, response)
        return response

    return router

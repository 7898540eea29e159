"""Cookies: random session tokens, the local user's name, and the attributes that both are set with."""

import hashlib
import secrets
from datetime import timedelta
from urllib.parse import quote, unquote

from starlette.responses import Response

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.store.question_queue import check_name

SESSION_COOKIE, NAME_COOKIE, BROWSER_COOKIE = "deep_rlhf_session", "deep_rlhf_name", "deep_rlhf_browser"
NAME_LIFETIME = timedelta(days=365)  # of the last two


def new_token() -> str:
    """Returns 256 random bits as text."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """Returns the SHA-256 of a random token, for storage; 256 random bits need no slow hash."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def set_cookie(response: Response, name: str, value: str, *, secure: bool, lifetime: timedelta | None = None) -> None:
    """Sets a cookie that scripts cannot read and that is sent with links from other sites, but not with their forms.

    SameSite=Strict would not be sent with links either, so a user who followed one would look like a new browser.
    """
    age = None if lifetime is None else int(lifetime.total_seconds())
    name = cookie_name(name, secure=secure)
    response.set_cookie(name, value, max_age=age, path="/", secure=secure, httponly=True, samesite="lax")


def cookie_name(name: str, *, secure: bool) -> str:
    """The name as sent: the `__Host-` prefix keeps other hosts of the domain, and plain HTTP, from setting it."""
    return f"__Host-{name}" if secure else name


def name_in(cookie: str) -> str | None:
    """Decodes the user name in a cookie; None if the store would not accept it."""
    name = unquote(cookie)
    try:
        check_name(name)
    except UserError:
        return None
    return name


def set_name_cookie(response: Response, name: str, *, secure: bool) -> None:
    """Stores the local user's name in their browser. Raises StoreError for a name that the store does not accept."""
    check_name(name)
    set_cookie(response, NAME_COOKIE, quote(name), secure=secure, lifetime=NAME_LIFETIME)

"""Authentication: accounts, access token, local user.

Each browser has one random cookie. Without accounts, on loopback, it only ties forms to the browser, and a second
cookie holds the local user's name. With accounts it is replaced at each login, and the store keeps its hash.
"""

import hashlib
import hmac
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.store import Role, Store, User
from deep_rlhf.web.access.client_address import is_forwarded
from deep_rlhf.web.access.cookies import (
    BROWSER_COOKIE,
    NAME_COOKIE,
    NAME_LIFETIME,
    SESSION_COOKIE,
    cookie_name,
    hash_token,
    name_in,
    new_token,
    set_cookie,
)
from deep_rlhf.web.access.passwords import (
    LONGEST_PASSWORD,
    NO_PASSWORD,
    check_password_length,
    dummy_hash,
    hash_password,
    is_password,
)
from deep_rlhf.web.problem import Problem
from deep_rlhf.web.settings import WebSettings, is_loopback

SAFE_METHODS = ("GET", "HEAD")
LOGIN_LIFETIME = timedelta(days=7)
_LOGIN_SLOTS = threading.Semaphore(20)  # each holds one of the server's 40 threads; the rest are for labelling


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A user who may label."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """A browser and its user, if known."""

    session: str
    needs_cookie: bool
    person: Person | None
    has_account: bool  # can log out
    secure: bool

    def keep(self, response: Response) -> None:
        """Sets the session cookie of a new browser."""
        if self.needs_cookie:
            set_cookie(response, SESSION_COOKIE, self.session, secure=self.secure)


class Accounts:
    """Authenticates browsers by password, access token or, on this machine, by name."""

    def __init__(self, store: Store, settings: WebSettings) -> None:
        """Raises ConfigError if other machines could reach a page without logins."""
        self.store, self.settings = store, settings
        self._has_passwords = False
        if settings.is_public and not settings.token and not self._any_password():
            raise ConfigError(
                f"The page would be open to everybody who reaches {settings.public_url or settings.host}: add an"
                " account with `deep-rlhf label --add_user NAME`, or set an access token in DEEP_RLHF_TOKEN."
            )

    def need_login(self) -> bool:
        """Whether users must log in; if not, every user of this machine is an administrator."""
        return self.settings.is_public or self.settings.token is not None or self._any_password()

    def visitor(self, request: Request) -> Visitor:
        """Identifies the sender of a request. Raises Problem for a remote client of a page without logins."""
        secure = self.settings.is_https
        given = request.cookies.get(cookie_name(SESSION_COOKIE, secure=secure), "")
        known = given if given.isascii() and 20 <= len(given) <= 100 else ""
        if self.need_login():
            user = self.store.login(hash_token(known)) if known else None
            person = Person(name=user.name, role=user.role) if user else None
        else:
            self._refuse_remote(request)
            name = name_in(request.cookies.get(cookie_name(NAME_COOKIE, secure=secure), ""))
            person = Person(name=name, role="admin") if name else None
        return Visitor(
            session=known or new_token(),
            # A form without our cookie comes from another site; a new cookie would replace the valid one.
            needs_cookie=not known and request.method in SAFE_METHODS,
            person=person,
            has_account=self.need_login(),
            secure=secure,
        )

    def log_in(self, visitor: Visitor, name: str, password: str, response: Response) -> bool:
        """Logs a browser in with a new cookie; returns False if the name and the password or token do not match.

        The access token creates an account under the chosen name, unless that name has a password. Raises Problem if
        too many logins are in progress.
        """
        if not _LOGIN_SLOTS.acquire(blocking=False):
            raise Problem(429, "Too many people are logging in; try again shortly.", {"Retry-After": "2"})
        try:
            user = self._user(name.strip(), password)
        finally:
            _LOGIN_SLOTS.release()
        if user is None:
            return False
        session = new_token()
        self.store.add_login(hash_token(session), user.name, datetime.now(UTC) + LOGIN_LIFETIME)
        self.store.remove_login(hash_token(visitor.session))
        set_cookie(response, SESSION_COOKIE, session, secure=visitor.secure, lifetime=LOGIN_LIFETIME)
        if user.password_hash != NO_PASSWORD:
            set_cookie(response, BROWSER_COOKIE, browser_mark(user), secure=visitor.secure, lifetime=NAME_LIFETIME)
        return True

    def is_known_browser(self, request: Request, name: str) -> bool:
        """Whether this user logged in with this browser before, under the present password."""
        given = request.cookies.get(cookie_name(BROWSER_COOKIE, secure=self.settings.is_https), "")
        user = self.store.user(name.strip()) if given else None
        if user is None or user.password_hash == NO_PASSWORD:
            return False
        return hmac.compare_digest(given.encode(), browser_mark(user).encode())

    def log_out(self, visitor: Visitor, response: Response) -> None:
        """Ends the browser's login and releases the questions leased to its user."""
        if visitor.person is not None:
            self.store.release(visitor.person.name)
        self.store.remove_login(hash_token(visitor.session))
        for cookie in (SESSION_COOKIE, NAME_COOKIE):
            set_cookie(response, cookie, "", secure=visitor.secure, lifetime=timedelta())

    def _user(self, name: str, password: str) -> User | None:
        if not name or len(password) > LONGEST_PASSWORD:
            return None
        user = self.store.user(name)
        token = self.settings.token
        if (
            token is not None
            and (user is None or user.password_hash == NO_PASSWORD)
            and hmac.compare_digest(hash_token(password), hash_token(token))
        ):
            if user is None:
                self.store.add_user(name, "annotator", NO_PASSWORD)
            return self.store.user(name)
        # An unknown name, or one without a password, takes as long as a wrong password.
        if user is None or user.password_hash == NO_PASSWORD:
            is_password(password, dummy_hash())
            return None
        return user if is_password(password, user.password_hash) else None

    def _any_password(self) -> bool:
        self._has_passwords = self._has_passwords or any(
            user.password_hash != NO_PASSWORD for user in self.store.users()
        )
        return self._has_passwords

    def _refuse_remote(self, request: Request) -> None:
        if is_forwarded(request) or not (request.client and is_loopback(request.client.host)):
            raise Problem(
                403, "This page is open only to users of its own machine: add an account, and set --public_url."
            )


def browser_mark(user: User) -> str:
    """The value of the cookie that marks a browser as this user's; computing it takes the hash of the password."""
    return hmac.new(user.password_hash.encode(), f"browser of {user.name}".encode(), hashlib.sha256).hexdigest()


def add_account(store: Store, name: str, role: Role, password: str) -> None:
    """Adds an account. Raises ConfigError for a bad password or name, StoreError for a name that is taken."""
    check_password_length(password)
    if name != name.strip():
        raise ConfigError("An account name must not begin or end with a blank.")
    store.add_user(name, role, hash_password(password))


def change_password(store: Store, name: str, password: str) -> None:
    """Sets a new password and ends the account's logins.

    Raises ConfigError for a bad password, StoreError for an unknown name.
    """
    check_password_length(password)
    store.set_password(name, hash_password(password))

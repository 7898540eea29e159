"""Who is at the other end: accounts with passwords, an access token, or simply the person at this machine.

A browser has one random cookie. Without accounts, on loopback, it only ties forms to the browser, and a second cookie
has the person's name. With accounts it is replaced at each login by a new one, whose hash the store keeps.
"""

import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from starlette.requests import Request
from starlette.responses import Response

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.store import Role, Store, User
from deep_rlhf.feedback.store.question_queue import check_name
from deep_rlhf.web.access.security import is_forwarded
from deep_rlhf.web.settings import WebSettings, is_loopback

SESSION_COOKIE, NAME_COOKIE = "deep_rlhf_session", "deep_rlhf_name"
SAFE_METHODS = ("GET", "HEAD")
LOGIN_LASTS = timedelta(days=7)
NAME_LASTS = timedelta(days=365)
SHORTEST_PASSWORD, LONGEST_PASSWORD = 8, 1000
NO_PASSWORD = "!"  # of accounts that the access token opens; no password has this hash
DEFAULT_NAME = "me"
_HASHER = PasswordHasher()
_HASHING = threading.Semaphore(2)  # each takes 64 MiB for a moment
_TRIES = threading.Semaphore(20)  # at once: each holds a thread, and labelling needs its share of the server's 40


class Problem(Exception):
    """Why a request is refused, in one sentence for the person."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody who may label."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """A browser, and who uses it, if that is known."""

    session: str
    needs_cookie: bool
    person: Person | None
    has_account: bool  # can log out
    secure: bool

    def keep(self, response: Response) -> None:
        """Gives a new browser its cookie."""
        if self.needs_cookie:
            set_cookie(response, SESSION_COOKIE, self.session, secure=self.secure)


class Accounts:
    """Decides who is let in."""

    def __init__(self, store: Store, settings: WebSettings) -> None:
        """Raises UserError where others could reach the page and nothing would keep them out."""
        self.store, self.settings = store, settings
        self._has_users = False
        if settings.is_public and not settings.token and not self._some_can_log_in():
            raise UserError(
                f"The page would be open to everybody who reaches {settings.public_url or settings.host}: add an"
                " account with `deep-rlhf label --add_user NAME`, or set an access token in DEEP_RLHF_TOKEN."
            )

    def need_login(self) -> bool:
        """Whether people log in; where not, whoever is at this machine may do everything."""
        return self.settings.is_public or self.settings.token is not None or self._some_can_log_in()

    def visitor(self, request: Request) -> Visitor:
        """Who sent a request. Raises Problem for one that came through a proxy to a page without logins."""
        secure = self.settings.is_https
        given = request.cookies.get(cookie_name(SESSION_COOKIE, secure=secure), "")
        known = given if given.isascii() and 20 <= len(given) <= 100 else ""
        if self.need_login():
            user = self.store.login(hash_of(known)) if known else None
            person = Person(name=user.name, role=user.role) if user else None
        else:
            self._refuse_strangers(request)
            name = name_of(request.cookies.get(cookie_name(NAME_COOKIE, secure=secure), ""))
            person = Person(name=name, role="admin") if name else None
        return Visitor(
            session=known or new_token(),
            # A form without our cookie is of another site, whose forms carry none; a new one would replace a valid one.
            needs_cookie=not known and request.method in SAFE_METHODS,
            person=person,
            has_account=self.need_login(),
            secure=secure,
        )

    def log_in(self, visitor: Visitor, name: str, password: str, response: Response) -> bool:
        """Logs a browser in, with a new cookie; False if name and password, or token, do not belong together.

        Raises Problem where too many try at once. Whoever brings the access token gets an account of the name he
        chooses, unless that has a password.
        """
        if not _TRIES.acquire(blocking=False):
            raise Problem(429, "Too many people log in at once: try again in a moment.", {"Retry-After": "2"})
        try:
            user = self._user(name.strip(), password)
        finally:
            _TRIES.release()
        if user is None:
            return False
        session = new_token()
        self.store.add_login(hash_of(session), user.name, datetime.now(UTC) + LOGIN_LASTS)
        self.store.remove_login(hash_of(visitor.session))
        set_cookie(response, SESSION_COOKIE, session, secure=visitor.secure, lasts=LOGIN_LASTS)
        return True

    def log_out(self, visitor: Visitor, response: Response) -> None:
        """Forgets this browser, and gives back what its person was asked."""
        if visitor.person is not None:
            self.store.release(visitor.person.name)
        self.store.remove_login(hash_of(visitor.session))
        for cookie in (SESSION_COOKIE, NAME_COOKIE):
            set_cookie(response, cookie, "", secure=visitor.secure, lasts=timedelta())

    def _user(self, name: str, password: str) -> User | None:
        if not name or len(password) > LONGEST_PASSWORD:
            return None
        user = self.store.user(name)
        token = self.settings.token
        if (
            token is not None
            and (user is None or user.password_hash == NO_PASSWORD)
            and hmac.compare_digest(hash_of(password), hash_of(token))
        ):
            if user is None:
                self.store.add_user(name, "annotator", NO_PASSWORD)
            return self.store.user(name)
        # A name that does not exist, or has no password, takes as long as a wrong password.
        if user is None or user.password_hash == NO_PASSWORD:
            is_password(password, _nobody())
            return None
        return user if is_password(password, user.password_hash) else None

    def _some_can_log_in(self) -> bool:
        self._has_users = self._has_users or any(user.password_hash != NO_PASSWORD for user in self.store.users())
        return self._has_users

    def _refuse_strangers(self, request: Request) -> None:
        if is_forwarded(request) or not (request.client and is_loopback(request.client.host)):
            raise Problem(
                403, "This page is open to people at its own machine only: add an account, and give --public_url."
            )


def add_account(store: Store, name: str, role: Role, password: str) -> None:
    """A new account. Raises UserError for a bad password or name, or one that is taken."""
    _check_password(password)
    if name != name.strip():
        raise UserError("A name does not begin or end with a blank.")
    store.add_user(name, role, hash_password(password))


def change_password(store: Store, name: str, password: str) -> None:
    """Another password; whoever is logged in must log in again. Raises UserError for a bad one, or an unknown name."""
    _check_password(password)
    store.set_password(name, hash_password(password))


def hash_password(password: str) -> str:
    """The argon2id hash of a password, with its salt."""
    with _HASHING:
        return _HASHER.hash(password)


def is_password(password: str, password_hash: str) -> bool:
    """Whether this is the password; it takes its time."""
    try:
        with _HASHING:
            return _HASHER.verify(password_hash, password)
    except (VerificationError, InvalidHashError, UnicodeEncodeError):
        return False


def name_of(cookie: str) -> str | None:
    """The name in a cookie, None if it has none that the store takes."""
    name = unquote(cookie)
    try:
        check_name(name)
    except UserError:
        return None
    return name


def remember_name(response: Response, name: str, *, secure: bool) -> None:
    """Keeps the name of the person at this machine in his browser. Raises StoreError for a name that cannot be."""
    check_name(name)
    set_cookie(response, NAME_COOKIE, quote(name), secure=secure, lasts=NAME_LASTS)


def set_cookie(response: Response, name: str, value: str, *, secure: bool, lasts: timedelta | None = None) -> None:
    """A cookie that no script reads, and that comes with links from other sites but not with their forms.

    SameSite=Strict would not come with links either: whoever followed one would seem to be a new browser.
    """
    age = None if lasts is None else int(lasts.total_seconds())
    name = cookie_name(name, secure=secure)
    response.set_cookie(name, value, max_age=age, path="/", secure=secure, httponly=True, samesite="lax")


def cookie_name(name: str, *, secure: bool) -> str:
    """A cookie's name: with HTTPS one that no other host of the domain, and no plain HTTP, can set."""
    return f"__Host-{name}" if secure else name


def new_token() -> str:
    """256 random bits."""
    return secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """What is kept of a random token: nothing that could be guessed back, so a fast hash will do."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _check_password(password: str) -> None:
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise UserError(f"A password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters.")


_dummy: list[str] = []


def _nobody() -> str:
    if not _dummy:
        _dummy.append(hash_password(new_token()))
    return _dummy[0]

"""Who may open the page: accounts, and browsers that are logged in. Only hashes are kept.

Every function runs inside one transaction.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import Connection, delete, insert, select, update

from deep_rlhf.feedback.store.errors import StoreError
from deep_rlhf.feedback.store.question_queue import check_name, release
from deep_rlhf.feedback.store.schema import LoginRow, UserRow
from deep_rlhf.feedback.store.statements import table_of

USERS, LOGINS = table_of(UserRow), table_of(LoginRow)

Role = Literal["admin", "annotator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An account."""

    name: str
    role: Role
    password_hash: str = field(repr=False)
    created: datetime


def add_user(db: Connection, name: str, role: str, password_hash: str, now: datetime) -> None:
    """A new account; raises StoreError if the name is taken."""
    check_name(name, "The name of a user")
    if role not in get_args(Role):
        raise StoreError(f"A role is one of {', '.join(get_args(Role))}, not {role}.")
    if user(db, name) is not None:
        raise StoreError(f"There is a user '{name}' already.")
    db.execute(insert(USERS).values(name=name, role=role, password_hash=password_hash, created=now))


def set_password(db: Connection, name: str, password_hash: str) -> None:
    """Another password, with which all browsers must log in again. Raises StoreError if there is no such user."""
    _check_exists(db, name)
    db.execute(update(USERS).where(USERS.c.name == name).values(password_hash=password_hash))
    db.execute(delete(LOGINS).where(LOGINS.c.name == name))


def remove_user(db: Connection, name: str) -> None:
    """An account goes, and its logins with it; what it holds is given back, and its answers stay. Raises StoreError."""
    _check_exists(db, name)
    release(db, name)
    db.execute(delete(USERS).where(USERS.c.name == name))


def user(db: Connection, name: str) -> User | None:
    """The account of this name."""
    if not name.isprintable():
        return None
    row = db.execute(select(USERS).where(USERS.c.name == name)).mappings().one_or_none()
    return None if row is None else User(**row)


def users(db: Connection) -> list[User]:
    """All accounts by name."""
    return [User(**row) for row in db.execute(select(USERS).order_by(USERS.c.name)).mappings()]


def add_login(db: Connection, token_hash: str, name: str, expires: datetime, now: datetime) -> None:
    """A browser logs in; those whose time is over are forgotten. Raises StoreError if there is no such user."""
    _check_exists(db, name)
    db.execute(delete(LOGINS).where(LOGINS.c.expires <= now))
    db.execute(insert(LOGINS).values(token_hash=token_hash, name=name, expires=expires))


def login(db: Connection, token_hash: str, now: datetime) -> User | None:
    """Who logged in with this token, None if nobody did or the time is over."""
    valid = (LOGINS.c.token_hash == token_hash) & (LOGINS.c.expires > now)
    row = db.execute(select(USERS).join(LOGINS, LOGINS.c.name == USERS.c.name).where(valid)).mappings().one_or_none()
    return None if row is None else User(**row)


def remove_login(db: Connection, token_hash: str) -> None:
    """A browser logs out."""
    db.execute(delete(LOGINS).where(LOGINS.c.token_hash == token_hash))


def _check_exists(db: Connection, name: str) -> None:
    if user(db, name) is None:
        raise StoreError(f"There is no user '{name}'.")

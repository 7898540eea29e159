"""Accounts of the page, and browsers that are logged in. Passwords and tokens are stored as hashes.

Every function runs inside one transaction.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import Connection, delete, insert, select, update

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.store.question_queue import check_name, release
from deep_rlhf.feedback.store.schema import LOGINS, USERS

Role = Literal["admin", "annotator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An account."""

    name: str
    role: Role
    password_hash: str = field(repr=False)
    created: datetime


def add_user(db: Connection, name: str, role: str, password_hash: str, now: datetime) -> None:
    """Adds an account; raises StoreError if the name is taken."""
    check_name(name, "The name of a user")
    if role not in get_args(Role):
        raise StoreError(f"A role must be one of {', '.join(get_args(Role))}, not {role}.")
    if user(db, name) is not None:
        raise StoreError(f"There is already a user '{name}': choose another name.")
    db.execute(insert(USERS).values(name=name, role=role, password_hash=password_hash, created=now))


def set_password(db: Connection, name: str, password_hash: str) -> None:
    """Replaces a password and logs all browsers out. Raises StoreError if there is no such user."""
    _check_exists(db, name)
    db.execute(update(USERS).where(USERS.c.name == name).values(password_hash=password_hash))
    db.execute(delete(LOGINS).where(LOGINS.c.name == name))


def remove_user(db: Connection, name: str) -> None:
    """Removes an account and its logins, and releases its questions; its labels stay.

    Raises StoreError if there is no such user.
    """
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
    """Adds a login and deletes the expired ones. Raises StoreError if there is no such user."""
    _check_exists(db, name)
    db.execute(delete(LOGINS).where(LOGINS.c.expires <= now))
    db.execute(insert(LOGINS).values(token_hash=token_hash, name=name, expires=expires))


def login(db: Connection, token_hash: str, now: datetime) -> User | None:
    """The user whose login has this token hash, None if there is none or it expired."""
    valid = (LOGINS.c.token_hash == token_hash) & (LOGINS.c.expires > now)
    row = db.execute(select(USERS).join(LOGINS, LOGINS.c.name == USERS.c.name).where(valid)).mappings().one_or_none()
    return None if row is None else User(**row)


def remove_login(db: Connection, token_hash: str) -> None:
    """Deletes a login."""
    db.execute(delete(LOGINS).where(LOGINS.c.token_hash == token_hash))


def _check_exists(db: Connection, name: str) -> None:
    if user(db, name) is None:
        raise StoreError(f"There is no user '{name}'.")

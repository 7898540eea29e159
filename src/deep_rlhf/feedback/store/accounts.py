"""Who may open the page: accounts, and browsers that are logged in. Only hashes are kept.

Every function runs inside one transaction.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from deep_rlhf.feedback.store.asking import check_name
from deep_rlhf.feedback.store.errors import StoreError
from deep_rlhf.feedback.store.tables import LoginRow, UserRow

Role = Literal["admin", "annotator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """An account."""

    name: str
    role: Role
    password_hash: str = field(repr=False)
    created: datetime


def add_user(session: Session, name: str, role: str, password_hash: str, now: datetime) -> None:
    """A new account; raises StoreError if the name is taken."""
    check_name(name, "The name of a user")
    if role not in get_args(Role):
        raise StoreError(f"A role is one of {', '.join(get_args(Role))}, not {role}.")
    if user(session, name) is not None:
        raise StoreError(f"There is a user '{name}' already.")
    session.execute(insert(UserRow).values(name=name, role=role, password_hash=password_hash, created=now))


def user(session: Session, name: str) -> User | None:
    """The account of this name."""
    row = session.get(UserRow, name) if name.isprintable() else None
    return None if row is None else _user_of(row)


def users(session: Session) -> list[User]:
    """All accounts by name."""
    return [_user_of(row) for row in session.scalars(select(UserRow).order_by(UserRow.name))]


def add_login(session: Session, token_hash: str, name: str, expires: datetime, now: datetime) -> None:
    """A browser logs in; those whose time is over are forgotten. Raises StoreError if there is no such user."""
    if user(session, name) is None:
        raise StoreError(f"There is no user '{name}'.")
    session.execute(delete(LoginRow).where(LoginRow.expires <= now))
    session.execute(insert(LoginRow).values(token_hash=token_hash, name=name, expires=expires))


def login(session: Session, token_hash: str, now: datetime) -> User | None:
    """Who logged in with this token, None if nobody did or the time is over."""
    row = session.scalar(
        select(UserRow)
        .join(LoginRow, LoginRow.name == UserRow.name)
        .where(LoginRow.token_hash == token_hash, LoginRow.expires > now)
    )
    return None if row is None else _user_of(row)


def remove_login(session: Session, token_hash: str) -> None:
    """A browser logs out."""
    session.execute(delete(LoginRow).where(LoginRow.token_hash == token_hash))


def _user_of(row: UserRow) -> User:
    return User(name=row.name, role=row.role, password_hash=row.password_hash, created=row.created)  # type: ignore[arg-type]

"""What people are asked and answer, kept in SQLite or PostgreSQL: the only place where page and trainer meet."""

from deep_rlhf.feedback.store.accounts import Role, User
from deep_rlhf.feedback.store.errors import Refused, StoreError, Unavailable
from deep_rlhf.feedback.store.replication import GivenAnswer
from deep_rlhf.feedback.store.store import Store

__all__ = ["GivenAnswer", "Refused", "Role", "Store", "StoreError", "Unavailable", "User"]

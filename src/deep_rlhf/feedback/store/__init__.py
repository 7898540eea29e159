"""The store of questions and labels, in SQLite or PostgreSQL. Page and trainer exchange everything through it."""

from deep_rlhf.feedback.store.accounts import Role, User
from deep_rlhf.feedback.store.replication import PortableLabel
from deep_rlhf.feedback.store.store import Store

__all__ = ["PortableLabel", "Role", "Store", "User"]

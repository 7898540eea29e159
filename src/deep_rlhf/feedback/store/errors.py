"""What the store says no to, each in one sentence for the person or the caller."""

from typing import Literal

from deep_rlhf.errors import UserError


class StoreError(UserError):
    """The store cannot do what was asked."""


class Refused(StoreError):
    """An answer that cannot be taken.

    `status` is "taken" (somebody else has the question now), "gone" (this person has answered it already) or "unknown"
    (there is no such question, or it was never put to this person).
    """

    def __init__(self, message: str, status: Literal["gone", "taken", "unknown"]) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(StoreError):
    """The database does not answer now. Whether the last change was saved is not known: send it again, same token."""

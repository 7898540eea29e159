"""The exceptions that users meet; each message says in one sentence what is wrong, where, and what to do.

Every command ends with exit code 2 when one of them is raised. From Python, catch `UserError` for all of them, or a
subclass for one kind.
"""

from typing import Literal


class UserError(Exception):
    """Base class: something that the user can correct."""


class ConfigError(UserError, ValueError):
    """A flag, a setting or a combination of settings is not valid."""


class DataError(UserError):
    """A data set, a prompt file or an imported file cannot be used."""


class ModelError(UserError):
    """A model, an adapter or a tokenizer cannot be opened, saved or used for what was asked."""


class RewardError(UserError):
    """A reward function or a reward model raised, hung or returned something that is not a reward."""


class NotFiniteError(UserError):
    """A loss, a gradient, an output or a weight is NaN or infinite; it has not reached anything that was saved."""


class CheckpointError(UserError):
    """A checkpoint or run folder cannot be written, read, or continued with these settings."""


class ResourceError(UserError):
    """Memory, disk space, a port or an optional package is missing."""


class StoreError(UserError):
    """A store of labels cannot be opened, read or written."""


class LabelRefused(StoreError):
    """A label, skip or undo that the store cannot accept.

    `status` is "taken" (somebody else has the question now), "gone" (this person has labelled it already) or "unknown"
    (no such question, or it was never given to this person).
    """

    def __init__(self, message: str, status: Literal["gone", "taken", "unknown"]) -> None:
        super().__init__(message)
        self.status = status


class StoreUnavailable(StoreError):
    """The database does not answer. The last change may or may not be saved: send it again with the same token.

    `shown` is the sentence for visitors of the page, without names of files and hosts.
    """

    def __init__(self, message: str, shown: str = "The database is not available; try again shortly.") -> None:
        super().__init__(message)
        self.shown = shown


class StoreDamaged(StoreError):
    """A store holds something that cannot be read: a damaged file, a missing table, a row that nobody wrote.

    `shown` is the sentence for visitors of the page, without names of files and hosts.
    """

    def __init__(self, name: str, damage: str) -> None:
        damage = "".join(c if c.isprintable() else "?" for c in damage)  # it may quote what the file holds
        hint = "Restore a copy, or repair it in the database's own shell; nothing was changed."
        super().__init__(f"{name} is damaged: {damage}. {hint}")
        self.shown = f"The store is damaged: {damage}. {hint}"


def one_line(error: BaseException) -> str:
    """What an exception of a library says, in one line; its class if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

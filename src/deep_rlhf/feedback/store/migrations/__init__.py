"""The migrations of the store, run by the program itself: no alembic.ini, and never a command to remember."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from deep_rlhf.feedback.store.errors import StoreError


def configuration() -> Config:
    """Where Alembic finds the scripts."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def upgrade(connection: Connection, name: str) -> None:
    """Brings the store to the newest revision, inside the transaction that `connection` has begun.

    Raises StoreError for a store of a later version of this program.
    """
    config = configuration()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(f"{name} was made by a later version of deep-rlhf: update this one ({error}).") from None


def head() -> str | None:
    """The newest revision."""
    return ScriptDirectory.from_config(configuration()).get_current_head()

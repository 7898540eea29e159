"""The migrations of the store. Opening a store runs them; there is no alembic.ini and no command to run."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from deep_rlhf.errors import StoreError


def configuration() -> Config:
    """The Alembic configuration, with the folder of the scripts."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def upgrade(connection: Connection, name: str) -> None:
    """Migrates the store to the newest revision, inside the transaction that `connection` has begun.

    Raises StoreError for a store that a later version of deep-rlhf made.
    """
    config = configuration()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(f"{name} was made by a later version of deep-rlhf: update this one ({error}).") from None


def scripts() -> ScriptDirectory:
    """The migrations."""
    return ScriptDirectory.from_config(configuration())


def head() -> str | None:
    """The newest revision."""
    return scripts().get_current_head()

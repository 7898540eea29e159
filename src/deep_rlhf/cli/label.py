"""`deep-rlhf label`: serves the page alone, on a store of imported questions or of a loop that runs elsewhere."""

import getpass
import os
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from deep_rlhf.cli.flags import parse_flags
from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.store import Role, Store
from deep_rlhf.settings import check_settings, setting

STORE_VARIABLE, TOKEN_VARIABLE, PASSWORD_VARIABLE = "DEEP_RLHF_STORE", "DEEP_RLHF_TOKEN", "DEEP_RLHF_PASSWORD"
DEFAULT_STORE = "outputs/teach/labels.db"
SHORTEST_LEASE = 180.0  # seconds: the page renews every minute, and the store only leases that are half over

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class LabelConfig:
    """Where the store is, and how the page is served. Raises ConfigError for a value out of bounds."""

    store: str | None = setting(None, f"a file or a PostgreSQL URL; default: ${STORE_VARIABLE}, or {DEFAULT_STORE}")
    host: str = setting(
        "127.0.0.1", "address to serve on; any but this machine's own require an account or an access token"
    )
    port: int = setting(8000, "port to serve on; 0 selects a free one", least=0, below=65_536)
    public_url: str | None = setting(
        None, "URL under which browsers reach the page through a proxy, such as https://labels.example.org"
    )
    lease_seconds: float = setting(
        300.0, "how long a question stays reserved for a person whose browser is gone", least=SHORTEST_LEASE, below=1e6
    )
    add_user: str | None = setting(
        None, f"adds this account and exits; asks for its password, or reads it from ${PASSWORD_VARIABLE}"
    )
    set_password: str | None = setting(None, "gives this account a new password, logs it out everywhere, and exits")
    remove_user: str | None = setting(None, "removes this account, logs it out everywhere, and exits; its labels stay")
    role: Role = setting("annotator", "role of the new account: annotator, or admin, who may stop the trainer")

    def __post_init__(self) -> None:
        check_settings(self)
        if sum(name is not None for name in (self.add_user, self.set_password, self.remove_user)) > 1:
            raise ConfigError("Give one of --add_user, --set_password and --remove_user at a time.")

    @property
    def store_address(self) -> str:
        """The file or URL of the store: the flag, the environment variable, or the default."""
        return self.store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE


def main(argv: list[str] | None = None) -> None:
    """Serves the page until Ctrl-C, or adds, changes or removes an account."""
    (config,) = parse_flags(argv, LabelConfig, prog="deep-rlhf label", description=__doc__.split("\n")[0])
    if config.add_user is not None:
        _add_user(config, config.add_user)
        return
    if config.set_password is not None:
        _set_password(config, config.set_password)
        return
    if config.remove_user is not None:
        _remove_user(config, config.remove_user)
        return
    from deep_rlhf.web.app import WebSettings, create_app
    from deep_rlhf.web.server import Server

    settings = WebSettings(
        host=config.host,
        port=config.port,
        public_url=config.public_url,
        token=os.environ.get(TOKEN_VARIABLE) or None,
    )
    with Store(config.store_address, lease_seconds=config.lease_seconds) as store:
        server = Server(create_app(store, settings), settings.host, settings.port)
        console.print(f"Open [bold]{escape(settings.public_url or server.url)}[/bold]; Ctrl-C stops it.")
        console.print(f"{store!r}: {store.waiting():,} questions are waiting.", markup=False)
        server.run()


def _add_user(config: LabelConfig, name: str) -> None:
    from deep_rlhf.web.access.auth import add_account

    with Store(config.store_address) as store:
        add_account(store, name, config.role, _password(name))
    console.print(f"{name} can log in now, as {config.role}.", markup=False)


def _set_password(config: LabelConfig, name: str) -> None:
    from deep_rlhf.web.access.auth import change_password

    with Store(config.store_address, must_exist=True) as store:
        change_password(store, name, _password(name))
    console.print(f"{name} has a new password, and is logged out everywhere.", markup=False)


def _remove_user(config: LabelConfig, name: str) -> None:
    with Store(config.store_address, must_exist=True) as store:
        store.remove_user(name)
    console.print(f"{name} cannot log in any more; their labels stay.", markup=False)


def _password(name: str) -> str:
    """Reads a password from the environment, or twice from the terminal. Raises ConfigError if there is none."""
    given = os.environ.get(PASSWORD_VARIABLE)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise ConfigError(f"There is no terminal to ask for a password on: set {PASSWORD_VARIABLE}.")
    try:
        password = getpass.getpass(f"Password of {name}: ")
        again = getpass.getpass("The same password again: ")
    except EOFError:
        raise ConfigError("No password was given: type it twice.") from None
    if password != again:
        raise ConfigError("The two passwords differ: try again.")
    return password

"""`deep-rlhf label`: only the page, on the store of a loop that another command runs, or that files were put into."""

import getpass
import os
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from deep_rlhf.cli.flags import parse_flags
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.store import Store

STORE_VARIABLE, TOKEN_VARIABLE, PASSWORD_VARIABLE = "DEEP_RLHF_STORE", "DEEP_RLHF_TOKEN", "DEEP_RLHF_PASSWORD"
DEFAULT_STORE = "outputs/teach/labels.db"
ROLES = ("admin", "annotator")
SHORTEST_LEASE = 180.0  # seconds: the page renews each minute, and the store only what is half over

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class LabelConfig:
    """Where the store is, and how the page is served. Raises UserError for a value that cannot work."""

    store: str | None = field(
        default=None,
        metadata={"help": f"a file or a PostgreSQL address; default: ${STORE_VARIABLE}, or {DEFAULT_STORE}"},
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to serve on; others than this machine's need an account or an access token"},
    )
    port: int = field(default=8000, metadata={"help": "port to serve on; 0 takes a free one"})
    public_url: str | None = field(
        default=None, metadata={"help": "how browsers reach the page through a proxy, as in https://labels.example.org"}
    )
    lease_seconds: float = field(
        default=300.0, metadata={"help": "how long a question is lent to a person whose browser is gone"}
    )
    add_user: str | None = field(
        default=None,
        metadata={"help": f"adds this account and ends; its password is asked for, or read from ${PASSWORD_VARIABLE}"},
    )
    set_password: str | None = field(
        default=None, metadata={"help": "gives this account a new password, logs it out everywhere, and ends"}
    )
    remove_user: str | None = field(
        default=None, metadata={"help": "removes this account, logs it out everywhere, and ends; its answers stay"}
    )
    role: str = field(
        default="annotator", metadata={"help": "of the new account: annotator, or admin, who may stop the trainer"}
    )

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"role must be one of {', '.join(ROLES)}, not {self.role}.")
        if sum(name is not None for name in (self.add_user, self.set_password, self.remove_user)) > 1:
            raise UserError("Give one of --add_user, --set_password and --remove_user at a time.")
        if not SHORTEST_LEASE <= self.lease_seconds < 1e6:
            raise UserError(f"lease_seconds must be at least {SHORTEST_LEASE:g}, not {self.lease_seconds:g}.")
        if not 0 <= self.port < 65_536:
            raise UserError(f"port must lie between 0 and 65535, not {self.port}.")

    @property
    def store_address(self) -> str:
        """Where the store is."""
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
        console.print(f"Open [bold]{escape(settings.public_url or server.url)}[/bold]; Ctrl-C ends it.")
        console.print(f"{store!r}: {store.waiting():,} questions wait.", markup=False)
        server.run()


def _add_user(config: LabelConfig, name: str) -> None:
    from deep_rlhf.web.access.auth import add_account

    with Store(config.store_address) as store:
        add_account(store, name, "admin" if config.role == "admin" else "annotator", _password(name))
    console.print(f"{name} may log in now, as {config.role}.", markup=False)


def _set_password(config: LabelConfig, name: str) -> None:
    from deep_rlhf.web.access.auth import change_password

    with Store(config.store_address, must_exist=True) as store:
        change_password(store, name, _password(name))
    console.print(f"{name} has a new password, and is logged out everywhere.", markup=False)


def _remove_user(config: LabelConfig, name: str) -> None:
    with Store(config.store_address, must_exist=True) as store:
        store.remove_user(name)
    console.print(f"{name} cannot log in any more; the answers stay.", markup=False)


def _password(name: str) -> str:
    """From the environment, or typed twice."""
    given = os.environ.get(PASSWORD_VARIABLE)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UserError(f"There is no terminal to ask for a password on: set {PASSWORD_VARIABLE}.")
    try:
        password = getpass.getpass(f"Password of {name}: ")
        again = getpass.getpass("The same again: ")
    except EOFError:
        raise UserError("No password was given.") from None
    if password != again:
        raise UserError("The two passwords differ: try again.")
    return password

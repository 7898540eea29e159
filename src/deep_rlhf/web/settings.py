"""Where the page is served, and whom it lets in."""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from deep_rlhf.errors import UserError

SHORTEST_TOKEN = 16  # characters of an access token


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings:
    """Raises UserError for a value that cannot work."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)  # whoever knows it may label under a name of his own
    public_url: str | None = None  # how browsers reach the page, where that is through a proxy

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise UserError(f"port must lie between 0 and 65535, not {self.port}.")
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise UserError(f"An access token has at least {SHORTEST_TOKEN} characters: make a longer one.")
        if self.public_url is not None and not self._has_good_url():
            raise UserError(f"public_url is like https://labels.example.org, without a path; not {self.public_url}.")

    def _has_good_url(self) -> bool:
        try:
            parts = urlsplit(self.public_url or "")
            return bool(
                parts.scheme in ("http", "https")
                and parts.hostname
                and parts.path in ("", "/")
                and not (parts.query or parts.fragment or parts.username)
                and (parts.port is None or parts.port > 0)
            )
        except ValueError:
            return False

    @property
    def is_public(self) -> bool:
        """Whether others than the people at this machine can reach the page."""
        return self.public_url is not None or not is_loopback(self.host)

    @property
    def public_host(self) -> str | None:
        """The host's name in `public_url`."""
        return urlsplit(self.public_url).hostname if self.public_url else None

    @property
    def is_https(self) -> bool:
        """Whether browsers reach the page encrypted, so that cookies may insist on it."""
        return self.public_url is not None and urlsplit(self.public_url).scheme == "https"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

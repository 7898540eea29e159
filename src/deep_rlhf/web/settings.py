"""Settings of the web page: its address, and who may use it."""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from deep_rlhf.errors import ConfigError
from deep_rlhf.settings import check_settings, setting

SHORTEST_TOKEN = 16  # characters of an access token


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings:
    """Where the page is served and who may use it. Raises ConfigError for a value that cannot work."""

    host: str = "127.0.0.1"
    port: int = setting(8000, "port to serve on; 0 takes a free one", least=0, most=65_535)
    token: str | None = field(default=None, repr=False)  # access token: its holder may label under any free name
    public_url: str | None = None  # the page's URL for browsers, if it is served through a proxy

    def __post_init__(self) -> None:
        check_settings(self)
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise ConfigError(f"The access token must have at least {SHORTEST_TOKEN} characters.")
        if self.public_url is not None and not self._has_good_url():
            raise ConfigError(
                f"public_url must be like https://labels.example.org, without a path, not {self.public_url}."
            )

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
        """Whether other machines can reach the page."""
        return self.public_url is not None or not is_loopback(self.host)

    @property
    def public_host(self) -> str | None:
        """The host name in `public_url`."""
        return urlsplit(self.public_url).hostname if self.public_url else None

    @property
    def is_https(self) -> bool:
        """Whether browsers reach the page over HTTPS, so that cookies can require it."""
        return self.public_url is not None and urlsplit(self.public_url).scheme == "https"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""The client's network address, also behind a proxy."""

import ipaddress

from starlette.requests import Request

from deep_rlhf.web.settings import WebSettings, is_loopback


def client_address(request: Request, settings: WebSettings) -> str:
    """The client's address; behind a proxy on this machine, the last one in X-Forwarded-For, which the proxy added.

    IPv6 addresses are reduced to their /64 network, since one client may own all of it.
    """
    address = request.client.host if request.client else "unknown"
    forwarded = request.headers.getlist("x-forwarded-for")
    if settings.public_url is not None and forwarded and is_loopback(address):
        address = forwarded[-1].rpartition(",")[2].strip()[:64]
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or ipaddress.IPv6Address(int(parsed) >> 64 << 64))


def is_forwarded(request: Request) -> bool:
    """Whether a proxy's headers are present."""
    return any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip"))

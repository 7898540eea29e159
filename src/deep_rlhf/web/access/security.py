"""What every request must pass, and every answer carries: headers, host, size, rate, and tokens against forgery."""

import hashlib
import hmac
import ipaddress
import json
import logging
import threading
from collections.abc import Iterable
from time import monotonic
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deep_rlhf.web.settings import WebSettings, is_loopback

logger = logging.getLogger(__name__)

LARGEST_BODY = 64 * 1024  # bytes: an answer has a few hundred
LONGEST_TARGET = 2048  # bytes of path and query

TOO_LARGE = f"A request has at most {LARGEST_BODY // 1024} KiB."
FAILED = "The page made a mistake, which stands in its log."
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


class Guard:
    """The outermost layer: refuses foreign hosts and what is too large, and puts the headers on whatever goes out."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._add_headers(MutableHeaders(scope=message), str(scope["path"]))
            await send(message)

        received = 0

        async def receive_guarded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > LARGEST_BODY:
                raise HTTPException(413, TOO_LARGE)
            return message

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None:
            try:
                await self.app(scope, receive_guarded, send_guarded)
            except Exception:
                if has_begun:
                    raise
                logger.exception("A request failed.")
                refusal = (500, FAILED)
        if refusal is not None:
            await _refuse(send_guarded, *refusal, as_json="application/json" in headers.get("accept", ""))

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if not is_known_host(headers.get("host", ""), self.settings):
            return 421, "This page is not served under that name."
        if _says_too_large(headers.get("content-length")):
            return 413, TOO_LARGE
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_TARGET:
            return 414, "The address is too long."
        return None

    def _add_headers(self, headers: MutableHeaders, path: str) -> None:
        headers.update(HEADERS)
        # A page holds what may have changed, and a form's token; the files of the page are asked for anew each time.
        headers.setdefault("cache-control", "no-cache" if path.startswith("/static/") else "no-store")
        if self.settings.is_https:
            headers["strict-transport-security"] = "max-age=31536000"


def is_known_host(host: str, settings: WebSettings) -> bool:
    """Whether the Host header is one of ours.

    On loopback a page of somebody else could give its own name this machine's address and then read ours (DNS
    rebinding). Elsewhere nobody is let in without a login, whose cookie such a page does not get.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if settings.public_host and name == settings.public_host:
        return True
    return bool(name) if not is_loopback(settings.host) else is_loopback(name)


def is_own_origin(request: Request, settings: WebSettings) -> bool:
    """Whether a request that changes something comes from our own page, as far as the browser tells.

    Other ports of this machine count as the same site, so SameSite cookies alone do not keep their pages out. The
    origin of a form is "null" under our referrer policy: then the other header and the token must do.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    if origin in (None, "null"):
        return True
    return origin in (
        f"http://{request.headers.get('host', '')}",
        f"https://{request.headers.get('host', '')}",
        (settings.public_url or "").rstrip("/"),
    )


def csrf_token(session: str) -> str:
    """What a form of this browser must carry; nobody can compute it who does not know the cookie."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


def is_csrf_token(token: object, session: str) -> bool:
    """Whether a form was made for this browser."""
    return (
        isinstance(token, str) and bool(session) and hmac.compare_digest(token.encode(), csrf_token(session).encode())
    )


def client_of(request: Request, settings: WebSettings) -> str:
    """The address of the other end; behind a proxy on this machine, the one that the proxy adds, which is the last.

    Of IPv6 only the network: whoever has one address there has 2⁶⁴.
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
    """Whether a proxy says that it passed this request on."""
    return any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip"))


class RateLimit:
    """A bucket of tokens per client: `burst` at once, then `per_second`."""

    MOST_CLIENTS = 10_000

    def __init__(self, per_second: float, burst: int) -> None:
        self.per_second, self.burst = per_second, burst
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted

    def wait(self, client: str) -> float:
        """Takes a token and returns 0, or the seconds until there is one."""
        now = monotonic()
        with self._lock:
            tokens = self._tokens(client, now)
            if tokens < 1:
                return (1 - tokens) / self.per_second
            if len(self._buckets) >= self.MOST_CLIENTS and client not in self._buckets:
                self._forget(now)
            self._buckets[client] = (tokens - 1, now)
        return 0.0

    def _tokens(self, client: str, now: float) -> float:
        tokens, then = self._buckets.get(client, (float(self.burst), now))
        return min(float(self.burst), tokens + (now - then) * self.per_second)

    def _forget(self, now: float) -> None:
        """Those whose buckets are full again; if all clients are busy, the older half."""
        full = [client for client in self._buckets if self._tokens(client, now) >= self.burst]
        gone: Iterable[str] = full or list(self._buckets)[: self.MOST_CLIENTS // 2]
        for client in gone:
            del self._buckets[client]


def _says_too_large(length: str | None) -> bool:
    return length is not None and (not length.isascii() or not length.isdigit() or int(length[:12]) > LARGEST_BODY)


async def _refuse(send: Send, status: int, sentence: str, *, as_json: bool) -> None:
    body = (json.dumps({"error": sentence}) if as_json else sentence).encode()
    headers = [
        (b"content-type", b"application/json" if as_json else b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what is left of the request is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

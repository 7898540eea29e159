"""Outermost middleware: host check, size limits, security headers, and one sentence instead of a traceback."""

import json
import logging
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deep_rlhf.web.settings import WebSettings, is_loopback

logger = logging.getLogger(__name__)

MAX_BODY = 64 * 1024  # bytes; a label takes a few hundred
MAX_TARGET = 2048  # bytes of path and query

TOO_LARGE = f"A request may have at most {MAX_BODY // 1024} KiB."
INTERNAL_ERROR = "Internal error; details are in the server log."
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
    """ASGI middleware: refuses unknown hosts and large requests, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
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
            if received > MAX_BODY:
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
                refusal = (500, INTERNAL_ERROR)
        if refusal is not None:
            await _refuse(send_guarded, *refusal, as_json="application/json" in headers.get("accept", ""))

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if not is_known_host(headers.get("host", ""), self.settings):
            return 421, "This page is not served under that host name."
        if _is_too_large(headers.get("content-length")):
            return 413, TOO_LARGE
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET:
            return 414, f"The address is longer than {MAX_TARGET} bytes."
        return None

    def _add_headers(self, headers: MutableHeaders, path: str) -> None:
        headers.update(HEADERS)
        # Pages hold form tokens and data that changes; static files are revalidated on each load.
        headers.setdefault("cache-control", "no-cache" if path.startswith("/static/") else "no-store")
        if self.settings.is_https:
            headers["strict-transport-security"] = "max-age=31536000"


def is_known_host(host: str, settings: WebSettings) -> bool:
    """Whether the Host header names this server.

    On loopback this prevents DNS rebinding: a foreign page that gives its own name this machine's address and then
    reads ours. Elsewhere every visitor needs a login, whose cookie such a page does not receive.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if settings.public_host and name == settings.public_host:
        return True
    return bool(name) if not is_loopback(settings.host) else is_loopback(name)


def _is_too_large(length: str | None) -> bool:
    return length is not None and (not length.isascii() or not length.isdigit() or int(length[:12]) > MAX_BODY)


async def _refuse(send: Send, status: int, sentence: str, *, as_json: bool) -> None:
    body = (json.dumps({"error": sentence}) if as_json else sentence).encode()
    headers = [
        (b"content-type", b"application/json" if as_json else b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the request is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

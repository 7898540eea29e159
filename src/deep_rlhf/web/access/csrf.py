"""Protection against cross-site request forgery: a token in every form, and a check of the request's origin."""

import hashlib
import hmac

from starlette.requests import Request

from deep_rlhf.web.settings import WebSettings


def csrf_token(session: str) -> str:
    """The token that this browser's forms must carry; computing it takes the session cookie."""
    return hmac.new(session.encode(), b"csrf", hashlib.sha256).hexdigest()


def is_csrf_token(token: object, session: str) -> bool:
    """Whether a form's token belongs to this browser."""
    return (
        isinstance(token, str) and bool(session) and hmac.compare_digest(token.encode(), csrf_token(session).encode())
    )


def is_own_origin(request: Request, settings: WebSettings) -> bool:
    """Whether a state-changing request comes from our own page, as far as the browser's headers show.

    Other ports of this machine are the same site, so SameSite cookies alone do not exclude their pages. Under our
    referrer policy a form's origin is "null"; then Sec-Fetch-Site and the token decide.
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

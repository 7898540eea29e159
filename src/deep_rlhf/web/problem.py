"""How a request is refused: an HTTP status and one sentence."""

from starlette.requests import Request


class Problem(Exception):
    """A request is refused: the HTTP status, one sentence for the reader, and extra response headers."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


def wants_json(request: Request) -> bool:
    """Whether the client is a script that expects JSON, not a browser that expects a page."""
    return "application/json" in request.headers.get("accept", "")

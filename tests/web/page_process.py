"""The server process of test_load, which the test kills."""

from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access import gate
from deep_rlhf.web.app import WebSettings, create_app
from deep_rlhf.web.server import serve


def serve_page(address: str, port: int) -> None:
    """Serves the page on a store that other processes have open, without rate limits."""
    gate.PEOPLE = gate.STRANGERS = (1e6, 1_000_000)
    with Store(address) as store:
        serve(create_app(store, WebSettings(port=port)), "127.0.0.1", port)

"""What the processes of test_load do until somebody kills them."""

from deep_rlhf.feedback.store import Store
from deep_rlhf.web.app import WebSettings, create_app
from deep_rlhf.web.server import serve


def serve_page(address: str, port: int) -> None:
    """The page on a store that others have open too."""
    with Store(address) as store:
        serve(create_app(store, WebSettings(port=port)), "127.0.0.1", port)

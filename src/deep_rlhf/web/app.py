"""The web page as an ASGI application: routes, middleware and static files on one store."""

import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

from fastapi import Depends, FastAPI
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from deep_rlhf.feedback.state import STORE_ID
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.account_routes import account_routes
from deep_rlhf.web.access.auth import Accounts
from deep_rlhf.web.access.cookies import new_token
from deep_rlhf.web.access.gate import Gate
from deep_rlhf.web.access.headers import Guard
from deep_rlhf.web.labelling.routes import label_routes
from deep_rlhf.web.progress.events import Hub, event_routes
from deep_rlhf.web.progress.routes import model_routes
from deep_rlhf.web.rendering.errors import add_error_handlers
from deep_rlhf.web.settings import WebSettings

__all__ = ["WebSettings", "create_app"]

STATIC = Path(str(files("deep_rlhf.web") / "static"))


def create_app(store: Store, settings: WebSettings | None = None) -> FastAPI:
    """Builds the page on a store. Raises ConfigError if other machines could reach it without a login."""
    settings = settings or WebSettings()
    accounts = Accounts(store, settings)
    gate = Gate(accounts, settings)
    hub = Hub(store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        hub.close()

    app = FastAPI(title="Deep RLHF", openapi_url=None, lifespan=lifespan)
    app.state.hub = hub
    app.state.store_id = id_of(store)
    for router in (account_routes(accounts, gate), label_routes(store), model_routes(store), event_routes(hub)):
        app.include_router(router, dependencies=[Depends(gate)])

    @app.get("/health")
    def health() -> Response:
        return PlainTextResponse("ok")

    mimetypes.add_type("text/javascript", ".js")  # some systems map it to another type, which nosniff would reject
    app.mount("/static", StaticFiles(directory=STATIC))
    add_error_handlers(app)
    app.add_middleware(Guard, settings=settings)
    return app


def id_of(store: Store) -> str:
    """A random id of the store, created once: question numbers are unique only within one store."""
    if STORE_ID.read(store) is None:
        STORE_ID.write(store, new_token())
    return STORE_ID.read(store) or ""  # read again: another server may have written its own in the meantime

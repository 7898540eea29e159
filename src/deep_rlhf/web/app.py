"""The page as an ASGI application: what it is put together from."""

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
from deep_rlhf.web.access.auth import Accounts, new_token
from deep_rlhf.web.access.gate import Gate
from deep_rlhf.web.access.security import Guard
from deep_rlhf.web.labelling.routes import label_routes
from deep_rlhf.web.progress.events import Hub, event_routes
from deep_rlhf.web.progress.routes import model_routes
from deep_rlhf.web.rendering.templates import add_refusals
from deep_rlhf.web.settings import WebSettings

__all__ = ["WebSettings", "create_app"]

STATIC = Path(str(files("deep_rlhf.web") / "static"))


def create_app(store: Store, settings: WebSettings | None = None) -> FastAPI:
    """The page on a store. Raises UserError where others could reach it and nothing would keep them out."""
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

    mimetypes.add_type("text/javascript", ".js")  # some systems know it by another name, and nosniff is strict
    app.mount("/static", StaticFiles(directory=STATIC))
    add_refusals(app)
    app.add_middleware(Guard, settings=settings)
    return app


def id_of(store: Store) -> str:
    """What tells this store from every other one, whose questions have the same numbers; made once."""
    if STORE_ID.read(store) is None:
        STORE_ID.write(store, new_token())
    return STORE_ID.read(store) or ""  # read again: another server may have written its own meanwhile

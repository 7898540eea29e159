"""Server-sent events: one task looks into the store while somebody listens, and tells all of them what changed."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deep_rlhf.errors import StoreUnavailable
from deep_rlhf.feedback.state import shown_values
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import Problem
from deep_rlhf.web.access.gate import Known

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds
ALIVE_EVERY = 15.0  # seconds, after which it is asked who listens, and a comment shows that the connection is there
RETRY = 2000  # milliseconds until a browser connects again
MOST_LISTENERS, MOST_PER_PERSON = 300, 12

State = dict[str, Any]  # what is told, by kind


class Listener:
    """One open connection: what it has not been told yet, the newest of each kind."""

    def __init__(self, person: str) -> None:
        self.person = person
        self.news: dict[str, Any] = {}
        self.wake = asyncio.Event()

    def tell(self, kind: str, value: Any) -> None:
        """Leaves news for the connection's own task."""
        self.news[kind] = value
        self.wake.set()


class Hub:
    """Everybody who listens. Belongs to one event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._listeners: set[Listener] = set()
        self._watching: asyncio.Task[None] | None = None
        self._state: State | None = None
        self._rows = 0
        self._closed = False

    def check_room(self, person: str) -> None:
        """Raises Problem where too many listen already."""
        own = sum(listener.person == person for listener in self._listeners)
        if own >= MOST_PER_PERSON or len(self._listeners) >= MOST_LISTENERS:
            raise Problem(429, "Too many pages are open: close some.", {"Retry-After": "30"})

    def join(self, person: str) -> Listener:
        """A new listener, who is first told how everything stands."""
        listener = Listener(person)
        self._listeners.add(listener)
        for kind, value in (self._state or {}).items():
            listener.tell(kind, value)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return listener

    def leave(self, listener: Listener) -> None:
        """A connection ended; the last one ends the looking."""
        self._listeners.discard(listener)
        if not self._listeners and self._watching is not None:
            self._watching.cancel()
            self._watching = self._state = None

    def close(self) -> None:
        """Ends every connection, so that the server can stop."""
        self._closed = True
        for listener in self._listeners:
            listener.wake.set()

    async def stream(self, person: str, is_known: Callable[[], bool]) -> AsyncIterator[str]:
        """What a connection is sent until it ends, or its person is not known any more."""
        listener = self.join(person)
        try:
            yield f"retry: {RETRY}\n\n"
            ask_at = monotonic() + ALIVE_EVERY
            while not self._closed:
                try:
                    await asyncio.wait_for(listener.wake.wait(), ask_at - monotonic())
                except TimeoutError:
                    if not await run_in_threadpool(is_known):
                        return
                    ask_at = monotonic() + ALIVE_EVERY
                    yield ": still here\n\n"
                    continue
                listener.wake.clear()
                news, listener.news = listener.news, {}
                for kind, value in news.items():
                    yield f"event: {kind}\ndata: {json.dumps(value)}\n\n"
        finally:
            self.leave(listener)

    async def _watch(self) -> None:
        while True:
            try:
                state = await run_in_threadpool(self._look)
            except Exception as error:  # the looking must go on, whatever one look met
                logger.debug("No news: %s", error)
            else:
                for kind, value in state.items():
                    if self._state is None or self._state[kind] != value:
                        for listener in self._listeners:
                            listener.tell(kind, value)
                self._state = state
            await asyncio.sleep(LOOK_EVERY)

    def _look(self) -> State:
        """What may have changed, by kind: counts and states, never what people or models said."""
        store = self.store
        self._rows = max((row["id"] for row in store.metrics(after=self._rows)), default=self._rows)
        policies, rewards = len(store.versions("policy")), len(store.versions("reward"))
        return {
            "questions": {"waiting": store.waiting()},
            "people": {"event": store.last_event()},
            "versions": {"policies": policies},
            "model": {
                "rows": self._rows,
                "versions": [policies, rewards],
                "alarms": len(store.alarms()),
                **shown_values(store),
            },
        }


def event_routes(hub: Hub) -> APIRouter:
    """The route that pages listen on."""
    router = APIRouter()

    @router.get("/events")
    async def events(request: Request, person: Known) -> Response:
        hub.check_room(person.name)

        def is_known() -> bool:
            """False after a logout, or once the login has run out."""
            try:
                return bool(request.state.accounts.visitor(request).person == person)
            except StoreUnavailable:
                return True  # until the database answers again

        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        return StreamingResponse(hub.stream(person.name, is_known), media_type="text/event-stream", headers=headers)

    return router

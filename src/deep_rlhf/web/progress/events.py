"""Server-sent events: while pages are connected, one task polls the store and sends each page what changed."""

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

from deep_rlhf.errors import StoreError
from deep_rlhf.feedback.state import shown_values
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.gate import Known
from deep_rlhf.web.problem import Problem

logger = logging.getLogger(__name__)

POLL_INTERVAL = 1.0  # seconds
PING_INTERVAL = 15.0  # seconds between checks of the login, each with a comment that keeps the connection alive
RETRY = 2000  # milliseconds until a browser reconnects
MAX_LISTENERS, MAX_PER_PERSON = 300, 12

State = dict[str, Any]  # kind of event -> its data


class Listener:
    """One open connection and its unsent events, the newest of each kind."""

    def __init__(self, person: str) -> None:
        self.person = person
        self.unsent: dict[str, Any] = {}
        self.wake = asyncio.Event()

    def put(self, kind: str, value: Any) -> None:
        """Queues an event for the connection's own task."""
        self.unsent[kind] = value
        self.wake.set()


class Hub:
    """All open connections. Belongs to one event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._listeners: set[Listener] = set()
        self._poller: asyncio.Task[None] | None = None
        self._state: State | None = None
        self._rows = 0
        self._closed = False

    def check_capacity(self, person: str) -> None:
        """Raises Problem if this user, or all users together, have too many connections."""
        own = sum(listener.person == person for listener in self._listeners)
        if own >= MAX_PER_PERSON or len(self._listeners) >= MAX_LISTENERS:
            raise Problem(429, "Too many pages are open; close some.", {"Retry-After": "30"})

    def join(self, person: str) -> Listener:
        """Adds a connection, which first receives the current state."""
        listener = Listener(person)
        self._listeners.add(listener)
        for kind, value in (self._state or {}).items():
            listener.put(kind, value)
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll())
        return listener

    def leave(self, listener: Listener) -> None:
        """Removes a connection; polling stops with the last one."""
        self._listeners.discard(listener)
        if not self._listeners and self._poller is not None:
            self._poller.cancel()
            self._poller = self._state = None

    def close(self) -> None:
        """Closes every connection, so that the server can stop."""
        self._closed = True
        for listener in self._listeners:
            listener.wake.set()

    async def stream(self, person: str, is_known: Callable[[], bool]) -> AsyncIterator[str]:
        """Yields the events of one connection until it closes or its user's login ends."""
        listener = self.join(person)
        try:
            yield f"retry: {RETRY}\n\n"
            ping_at = monotonic() + PING_INTERVAL
            while not self._closed:
                try:
                    await asyncio.wait_for(listener.wake.wait(), ping_at - monotonic())
                except TimeoutError:
                    if not await run_in_threadpool(is_known):
                        return
                    ping_at = monotonic() + PING_INTERVAL
                    yield ": still here\n\n"
                    continue
                listener.wake.clear()
                events, listener.unsent = listener.unsent, {}
                for kind, value in events.items():
                    yield f"event: {kind}\ndata: {json.dumps(value)}\n\n"
        finally:
            self.leave(listener)

    async def _poll(self) -> None:
        while True:
            try:
                state = await run_in_threadpool(self._read_state)
            except Exception as error:  # one failed poll must not end the others
                logger.debug("The store could not be polled: %s", error)
            else:
                for kind, value in state.items():
                    if self._state is None or self._state[kind] != value:
                        for listener in self._listeners:
                            listener.put(kind, value)
                self._state = state
            await asyncio.sleep(POLL_INTERVAL)

    def _read_state(self) -> State:
        """Reads what may have changed, by kind of event: counts and states, never what people or models wrote."""
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
    """Builds the route of the event stream."""
    router = APIRouter()

    @router.get("/events")
    async def events(request: Request, person: Known) -> Response:
        hub.check_capacity(person.name)

        def is_known() -> bool:
            """False after a logout or once the login has expired."""
            try:
                return bool(request.state.accounts.visitor(request).person == person)
            except StoreError:
                return True  # until the database can be read again

        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        return StreamingResponse(hub.stream(person.name, is_known), media_type="text/event-stream", headers=headers)

    return router

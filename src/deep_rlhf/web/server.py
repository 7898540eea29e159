"""The page on a port: in the foreground, or in a thread beside something else."""

import asyncio
import errno
import socket
import threading
import time
from types import TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI

from deep_rlhf.errors import UserError

SECONDS_TO_START = 30.0
SECONDS_TO_STOP = 5  # for requests that are under way
MOST_CONNECTIONS = 1000


class _Uvicorn(uvicorn.Server):
    """Ends the open event streams before it waits for connections to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        hub = getattr(self.config.app.state, "hub", None)  # type: ignore[union-attr]
        if hub is not None:
            hub.close()
        await super().shutdown(sockets)


class Server:
    """The page in a thread of its own; also a context manager. Port 0 takes a free one."""

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> None:
        """Raises UserError if the port cannot be had."""
        self._socket = _listen(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._server = _Uvicorn(_config(app))
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> Self:
        """Serves, and returns once requests are answered. Raises UserError if that does not come about."""
        self._thread.start()
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise UserError(f"The page does not start on {self.url}.")
            time.sleep(0.005)
        return self

    def run(self) -> None:
        """Serves in this thread until Ctrl-C or SIGTERM."""
        self._run()

    def stop(self) -> None:
        """Ends it, after the requests that are under way."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(SECONDS_TO_STOP + 5)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            self._socket.close()


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serves the page until it is stopped. Raises UserError if the port cannot be had."""
    Server(app, host, port).run()


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        access_log=False,  # addresses may hold what is nobody's business
        log_level="warning",
        log_config=None,  # by the program's own logging, if at all
        server_header=False,
        proxy_headers=False,  # `security.client_of` reads them, and only where a proxy is expected
        timeout_graceful_shutdown=SECONDS_TO_STOP,
        limit_concurrency=MOST_CONNECTIONS,
        ws="none",
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named so that asyncio knows it for TCP and switches off Nagle's delay, which costs 40 ms per answer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host.strip("[]"), port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        flag = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise UserError(f"The page cannot be served on {host}, port {port}: {reason}. Try another {flag}.") from None
    return bound

"""Serves the page on a port, in the foreground or in a thread."""

import asyncio
import errno
import socket
import threading
import time
from types import TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI

from deep_rlhf.errors import ConfigError, ResourceError

START_TIMEOUT = 30.0  # seconds
STOP_TIMEOUT = 5  # seconds for open requests
MAX_CONNECTIONS = 1000


class _Uvicorn(uvicorn.Server):
    """Closes the event streams before it waits for open connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        hub = getattr(self.config.app.state, "hub", None)  # type: ignore[union-attr]
        if hub is not None:
            hub.close()
        await super().shutdown(sockets)


class Server:
    """The page in its own thread; also a context manager. Port 0 takes a free port."""

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> None:
        """Raises ResourceError if the port is not available, ConfigError for a host that is not this machine."""
        self._socket = _listen(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._server = _Uvicorn(_config(app))
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)

    @property
    def url(self) -> str:
        """The page's URL."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> Self:
        """Starts serving and returns once the server accepts requests. Raises ResourceError if it does not start."""
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ResourceError(f"The page does not start on {self.url}.")
            time.sleep(0.005)
        return self

    def run(self) -> None:
        """Serves in this thread until Ctrl-C or SIGTERM."""
        self._run()

    def stop(self) -> None:
        """Stops the server after the open requests."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT + 5)

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
    """Serves the page until it is stopped. Raises as `Server`."""
    Server(app, host, port).run()


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        access_log=False,  # URLs may contain private data
        log_level="warning",
        log_config=None,  # leaves logging to the program
        server_header=False,
        proxy_headers=False,  # `client_address` reads them, and only behind a proxy
        timeout_graceful_shutdown=STOP_TIMEOUT,
        limit_concurrency=MAX_CONNECTIONS,
        ws="none",
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol given, asyncio recognises TCP and disables Nagle's algorithm, which costs 40 ms per reply.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host.strip("[]"), port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        message = f"The page cannot be served on {host}, port {port}: {reason}. Try another"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ResourceError(f"{message} --port.") from None
        raise ConfigError(f"{message} --host.") from None
    return bound

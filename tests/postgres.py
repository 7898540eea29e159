"""A real PostgreSQL server that a test session starts for itself, and empty databases on it."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from needs import skip_or_fail

USER = "postgres"
# Faster, and still what a kill -9 of the server tests: it loses nothing that was handed to the system.
SETTINGS = ("fsync=off", "full_page_writes=off", "max_connections=150", "shared_buffers=16MB", "log_min_messages=fatal")


def binaries() -> Path | None:
    """The newest installed server's programs."""
    homes = Path("/usr/lib/postgresql")
    found = [home / "bin" for home in homes.glob("*") if (home / "bin" / "initdb").exists()]
    on_path = shutil.which("initdb")
    found += [Path(on_path).resolve().parent] if on_path else []
    return max(found, key=lambda folder: folder.parent.name.zfill(4)) if found else None


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def name_of(url: str) -> str:
    """The name of the database that a URL leads to."""
    return url.rpartition("/")[2]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Server:
    """A running server. `database()` makes an empty database and returns its URL."""

    def __init__(self, folder: Path, programs: Path, port: int, *, settings: tuple[str, ...] = SETTINGS) -> None:
        self.folder, self.programs, self.port, self.settings = folder, programs, port, settings
        self._numbers = count()
        self._store: str | None = None

    def initialise(self) -> None:
        """Makes the data folder."""
        self._run("initdb", "-D", self.data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--no-sync", "--locale=C")

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = " ".join(
            [
                f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''",
                *(f"-c {s}" for s in self.settings),
            ]
        )
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", self.data, "-l", log, "-o", options, "-w", "-t", "60", "start")

    def stop(self) -> None:
        """Stops it, if it runs."""
        if (Path(self.data) / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "-t", "60", "stop")

    def kill(self) -> None:
        """SIGKILL for the server and all its processes; returns when they are gone."""
        file = Path(self.data) / "postmaster.pid"
        pid = int(file.read_text().split()[0])
        os.kill(pid, signal.SIGSTOP)  # or it would start more of them meanwhile
        processes = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(_is_alive(process) for process in processes):
            assert time.monotonic() < deadline, "the server does not die"
        file.unlink()  # a new server takes a dead one for alive whose parent has not waited for it

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def database(self) -> str:
        """The URL of a new and empty database."""
        name = f"test{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/{name}"

    def store(self) -> str:
        """The URL of a store with nothing in it: always the same, emptied, since a new one takes half a second."""
        from deep_rlhf.feedback.store import Store
        from deep_rlhf.feedback.store.schema import METADATA

        if self._store is None:
            self._store = self.database()
            Store(self._store).close()
        tables = ", ".join(METADATA.tables)
        # The store itself refuses to forget what people did.
        command = f"SET session_replication_role = replica; TRUNCATE {tables} RESTART IDENTITY"
        self.execute(command, database=name_of(self._store))
        return self._store

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        """Runs statements as the server's owner."""
        import psycopg

        with psycopg.connect(host="127.0.0.1", port=self.port, user=USER, dbname=database, autocommit=True) as admin:
            admin.execute(statement.encode())

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        if os.geteuid() == 0:  # the server refuses to run as root
            command = ["runuser", "-u", USER, "--", *command]
        # Its output goes to a file: a server that keeps a pipe open would let this wait for ever.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=self.folder)
            output.seek(0)
            assert done.returncode == 0, output.read().decode(errors="replace")


@contextmanager
def server(*, settings: tuple[str, ...] = SETTINGS) -> Iterator[Server]:
    """A server of its own, gone afterwards; skips or fails the test where PostgreSQL is not installed."""
    programs = binaries()
    if programs is None:
        skip_or_fail("PostgreSQL is not installed")
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        skip_or_fail("PostgreSQL does not run as root, and there is no runuser")
    # Not pytest's tmp_path: another user must be able to enter every folder above it.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER)
        running = Server(folder, programs, free_port(), settings=settings)
        running.initialise()
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_running: list[Server] = []


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One server for all tests of a worker, whichever modules import this."""
    if _running:  # of another module's fixture, which began before this one and ends after it
        yield _running[0]
        return
    with server() as started:
        _running.append(started)
        yield started
        _running.clear()

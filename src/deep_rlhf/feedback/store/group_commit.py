"""Batches concurrent writes into one transaction (group commit): twenty labels at once need one sync, not twenty."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

T = TypeVar("T")

MOST_JOBS = 64  # in one transaction


class _Job(Generic[T]):
    """What one thread wants to write, and its result."""

    def __init__(self, work: Callable[[Connection], T]) -> None:
        self.work = work
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class GroupCommitWriter:
    """Runs the writes of many threads one after the other, in as few transactions as possible.

    A thread that finds no writer active becomes the writer: it runs all waiting jobs in one transaction, each in its
    own savepoint, and commits. A job that raises is rolled back alone. If the commit fails, all jobs fail; none reports
    success before the commit.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._change = threading.Condition()
        self._waiting: list[_Job[Any]] = []
        self._is_writing = False

    def write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` and returns its result after the commit. Raises what `work` or the commit raises."""
        job = _Job(work)
        with self._change:
            self._waiting.append(job)
        while True:
            with self._change:
                self._change.wait_for(lambda: job.done or not self._is_writing)
                if job.done:
                    return job.result()
                self._is_writing = True
                jobs, self._waiting = self._waiting[:MOST_JOBS], self._waiting[MOST_JOBS:]
            try:
                self._write_all(jobs)
            finally:
                with self._change:
                    self._is_writing = False
                    for one in jobs:
                        one.done = True
                    self._change.notify_all()

    def _write_all(self, jobs: list[_Job[Any]]) -> None:
        try:
            with self._engine.begin() as connection:
                for job in jobs:
                    self._write_one(job, connection)
        except BaseException as error:
            for job in jobs:
                job.error = job.error or error
            if not isinstance(error, Exception):
                raise

    def _write_one(self, job: _Job[Any], connection: Connection) -> None:
        try:
            with connection.begin_nested():
                job.value = job.work(connection)
        except OperationalError:  # a full disk, for example: the whole transaction is lost
            raise
        except Exception as error:
            job.error = error

"""One commit for all who wait: what twenty people send at once reaches the disk with one sync instead of twenty."""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

T = TypeVar("T")

MOST_TOGETHER = 64


class _Job(Generic[T]):
    """What one thread wants written, and what came of it."""

    def __init__(self, work: Callable[[Connection], T]) -> None:
        self.work = work
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class TogetherWriter:
    """Runs the writing of many threads one after the other, in as few transactions as can be.

    Whoever finds nobody at work takes everything that waits into one transaction, each job in a savepoint of its own,
    and commits. A job that raises is taken back alone. If the commit fails, all fail: nobody hears of a success before.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._change = threading.Condition()
        self._waiting: list[_Job[Any]] = []
        self._somebody_writes = False

    def write(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, after the commit. Raises what it raises, or why the commit failed."""
        job = _Job(work)
        with self._change:
            self._waiting.append(job)
        while True:
            with self._change:
                self._change.wait_for(lambda: job.done or not self._somebody_writes)
                if job.done:
                    return job.result()
                self._somebody_writes = True
                jobs, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
            try:
                self._write_all(jobs)
            finally:
                with self._change:
                    self._somebody_writes = False
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
        except OperationalError:  # a full disk, for one: the whole transaction is lost
            raise
        except Exception as error:
            job.error = error

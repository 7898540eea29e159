"""A store on SQLite and on a PostgreSQL server that the tests start, and a clock that it goes by."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres import postgres  # noqa: F401
from store_parts import Clock

from deep_rlhf.feedback.store import Store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def blank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nothing in it, to be copied: to migrate one for each test would take longer than the test."""
    path = tmp_path_factory.mktemp("blank") / "labels.db"
    Store(path).close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where this test's store is."""
    if request.param == "sqlite":
        return str(shutil.copy(request.getfixturevalue("blank_file"), tmp_path / "labels.db"))
    return str(request.getfixturevalue("postgres").store())


@pytest.fixture
def open_store(address: str, clock: Clock) -> Iterator[Callable[..., Store]]:
    """open_store(**options): the store of this test, once more each time."""
    opened: list[Store] = []

    def open_it(**options: Any) -> Store:
        opened.append(Store(address, **{"lease_seconds": 60, "seed": 1, "clock": clock, **options}))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()

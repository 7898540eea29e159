"""A store with a few questions, the page on it without a network, and one browser for all tests of a worker."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_client import HH, Client

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.web import auth
from deep_rlhf.web.app import WebSettings, create_app

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(autouse=True)
def _quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_HASHER", auth.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "labels.db", seed=1) as opened:
        yield opened


@pytest.fixture
def add(store: Store) -> Callable[..., list[int]]:
    """add(3): so many questions, asked in this order; add("text", "a", "b"): that one."""

    def add(*what: Any, **fields: Any) -> list[int]:
        if isinstance(what[0], int):
            return store.add(
                [Comparison(prompt=HH.format(f"Question {i}?"), answers=(f"a{i}", f"b{i}")) for i in range(what[0])]
            )
        return store.add([Comparison(prompt=what[0], answers=what[1:], **fields)])

    return add


@pytest.fixture
def client(store: Store) -> Client:
    return Client(create_app(store, WebSettings()))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS)
        yield launched
        launched.close()

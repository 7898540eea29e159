"""A store, the page on it with or without a network, and one browser for all tests of a worker."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import skip_or_fail
from page_client import HH, Client
from page_keys import TIMEOUT, Visit, enter, wait_ready

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access import gate, passwords
from deep_rlhf.web.app import WebSettings, create_app
from deep_rlhf.web.progress import events
from deep_rlhf.web.server import Server

CHROMIUM = Path("/usr/bin/chromium")
# What Chromium and htmx log while the server is away or refuses a request.
FAILED = ("Failed to load resource: ", "htmx:sendError, ", "htmx:responseError, ", "htmx:afterRequest, ")
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(autouse=True)
def _quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_HASHER", passwords.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))


@pytest.fixture(autouse=True)
def rate_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that no test reaches, however fast the machine; a module that tests the limits overrides this fixture."""
    for name in ("PEOPLE", "STRANGERS", "LOGINS_FROM_ADDRESS", "LOGINS_TO_ACCOUNT"):
        monkeypatch.setattr(gate, name, (1e6, 1_000_000))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty store. Copying it takes a tenth of the time that creating one does."""
    path = tmp_path_factory.mktemp("empty") / "labels.db"
    Store(path).close()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copyfile(empty_store, tmp_path / "labels.db")
    with Store(tmp_path / "labels.db", seed=1) as opened:
        yield opened


@pytest.fixture
def add(store: Store) -> Callable[..., list[int]]:
    """add(3) adds three questions, asked in this order; add("prompt", "a", "b") adds one."""

    def add(*what: Any, **fields: Any) -> list[int]:
        if isinstance(what[0], int):
            return store.add(
                [Comparison(prompt=HH.format(f"Question {i}?"), responses=(f"a{i}", f"b{i}")) for i in range(what[0])]
            )
        return store.add([Comparison(prompt=what[0], responses=what[1:], **fields)])

    return add


@pytest.fixture
def client(store: Store) -> Client:
    return Client(create_app(store, WebSettings()))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        skip_or_fail("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def server(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(events, "POLL_INTERVAL", 0.1)
    with Server(create_app(store)) as running:
        yield running


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """visit("anna") opens the page in a new browser context; no tab of it may log an error, unless it `may_fail`."""
    problems: list[str] = []
    contexts = []

    def visit(
        name: str,
        *,
        password: str | None = None,
        size: tuple[int, int] = (1280, 800),
        may_fail: bool = False,
        **options: Any,
    ) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning") and not (may_fail and message.text.startswith(FAILED)):
                problems.append(message.text)

        context.on("console", on_console)
        context.on("weberror", lambda error: problems.append(str(error.error)))
        page.goto(server.url)
        enter(page, name, password)
        if options.get("java_script_enabled", True):
            wait_ready(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []

"""The sentences of the page that matter word for word. All other tests check facts: a status, a name, a number."""

from collections.abc import Callable
from typing import Any

import pytest
from page_client import Client
from page_keys import Add, Visit, number_on, press, wait_painted, wait_saved, wait_text

from deep_rlhf.errors import StoreUnavailable
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access import gate
from deep_rlhf.web.access.auth import add_account
from deep_rlhf.web.app import WebSettings, create_app
from deep_rlhf.web.progress import events

JSON = {"accept": "application/json"}
PASSWORD = "correct horse battery"
OTHER_STORE = "This page belongs to another store than the one that is served now."


def error(response: Any) -> str:
    return str(response.json()["error"])


def test_an_internal_error_points_to_the_log(client: Client, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client.enter()
    monkeypatch.setattr(store, "ask", lambda *_, **__: 1 / 0)
    assert error(client.get("/", headers=JSON)) == "Internal error; details are in the server log."


def test_a_database_that_is_away(client: Client, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("away")

    client.enter()
    monkeypatch.setattr(store, "ask", away)
    sentence = "The database is not available; try again shortly."
    assert error(client.get("/questions", headers=JSON)) == sentence
    assert sentence in client.get("/").text


def test_too_many_requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "STRANGERS", (1e-6, 1))
    client = Client(create_app(store))
    client.get("/login")
    assert error(client.get("/login", headers=JSON)) == "Too many requests; try again shortly."


def test_too_many_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_PER_PERSON", 0)
    assert error(client.enter().get("/events", headers=JSON)) == "Too many pages are open; close some."


@pytest.mark.parametrize("path", ["/answer", "/skip", "/undo"])
def test_a_page_of_another_store(client: Client, add: Add, path: str) -> None:
    add(1)
    client.enter()
    assert error(client.submit(path, question=1, token="t", choice="tie", store_id="other")) == OTHER_STORE
    assert error(client.get("/questions?store_id=other", headers=JSON)) == OTHER_STORE


def test_a_page_that_another_user_opened(client: Client) -> None:
    client.enter()
    refused = client.get("/questions", headers=JSON | {"x-csrf-token": "x"})
    assert error(refused) == "Another user has logged in since this page was opened."


def test_what_is_missing_or_forbidden(client: Client, store: Store) -> None:
    assert error(client.post("/name", data={"csrf": client.csrf(), "name": " "}, headers=JSON)) == "'name' is missing."
    assert error(client.post("/name", data={"csrf": client.csrf()}, headers=JSON)) == "'name' is missing."
    assert error(client.get("/nothing", headers=JSON)) == "Page not found."
    assert error(client.get("/questions", headers=JSON)) == "Log in first."
    add_account(store, "root", "admin", PASSWORD)
    add_account(store, "anna", "annotator", PASSWORD)
    public = Client(create_app(store, WebSettings(host="0.0.0.0")), base_url="http://labels.example.org")
    assert "Wrong name or password." in public.log_in("anna", "a guess").text
    public.log_in("anna", PASSWORD)
    assert error(public.submit("/stop", sure="true")) == "Only an administrator may do this."


def test_headings(client: Client, store: Store, add: Callable[..., list[int]]) -> None:
    assert "<h1>Your name</h1>" in client.get("/login").text
    assert "No questions at the moment</h1>" in client.enter().get("/").text
    add("Pair", "a", "b")
    assert "Which response is better?</h1>" in client.get("/").text
    store.release("me")
    store.withdraw(older_than_policy=1)
    add("Ranking", "a", "b", "c", policy_version=1)
    assert "Rank the responses</h1>" in client.get("/").text
    assert "<h1>Training progress</h1>" in client.get("/model").text


@pytest.mark.browser
def test_messages_and_announcements_while_labelling(visit: Visit, add: Add) -> None:
    add(2)
    page = visit("anna")
    page.keyboard.press("u")
    wait_text(page, "[data-message]", "There is nothing to undo.")
    for expected in ("clearly better", "Strength cleared"):
        page.keyboard.press("2")
        wait_text(page, "[data-announced]", expected)
    press(page, "s")
    wait_text(page, "[data-announced]", "Skipped. Next question.")
    page.keyboard.press("u")
    wait_text(page, "[data-announced]", "Your last label or skip was undone; label the question again.")
    assert number_on(page) == 1
    press(page, "ArrowLeft")
    wait_text(page, "[data-announced]", "Next question.")
    wait_saved(page)


@pytest.mark.browser
def test_messages_about_a_ranking(visit: Visit, add: Add) -> None:
    add("Rank", "one", "two", "three")
    page = visit("anna")
    page.keyboard.press("Enter")
    wait_text(page, "[data-message]", "3 responses have no rank yet.")
    for response, rank in ((1, 1), (3, 3)):
        page.get_by_role("group", name=f"Rank of response {response}").get_by_role("radio", name=str(rank)).check()
    page.get_by_role("button", name="Save ranking").click()
    wait_text(page, "[data-message]", "Response 2 has no rank yet.")


@pytest.mark.browser
def test_messages_while_the_server_is_away_or_the_login_is_over(visit: Visit, store: Store, add: Add) -> None:
    add(2)  # both are labelled below: a page without a question asks for one at each event
    page = visit("anna", may_fail=True)
    page.route("**/answer", lambda route: route.abort("connectionreset"))
    page.keyboard.press("ArrowUp")
    wait_text(page, "[data-unsaved]", "1 label is not saved yet: the server does not respond. Retrying …")
    press(page, "ArrowUp")
    wait_text(page, "[data-unsaved]", "2 labels are not saved yet: the server does not respond. Retrying …")
    page.get_by_role("button", name="Change name").click()
    wait_text(page, "[data-message]", "2 labels are not saved yet: wait before you leave.")
    add_account(store, "root", "admin", PASSWORD)
    for event, path in (("people", "/progress"), ("questions", "/questions")):  # neither leaves the page for /login
        with page.expect_response(lambda response, path=path: path in response.url):
            page.evaluate("event => document.body.dispatchEvent(new CustomEvent(event))", event)
        wait_painted(page)
    page.unroute_all(behavior="ignoreErrors")
    wait_text(page, "[data-message]", "2 labels are not saved yet. Log in to save.")

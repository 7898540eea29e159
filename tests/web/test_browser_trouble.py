"""Failures while people label in a real browser: no label is lost, counted twice or given to another user."""

from pathlib import Path
from typing import Any

import pytest
from page_keys import (
    Add,
    Visit,
    another_tab,
    enter,
    number_on,
    press,
    wait_empty,
    wait_question,
    wait_ready,
    wait_saved,
    wait_text,
)

from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import add_account
from deep_rlhf.web.access.cookies import SESSION_COOKIE, hash_token
from deep_rlhf.web.app import create_app
from deep_rlhf.web.server import Server

pytestmark = pytest.mark.browser

PASSWORD = "correct horse battery"
HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
LOOK_AGAIN = "document.dispatchEvent(new Event('visibilitychange'))"


def test_labels_wait_while_the_server_is_unreachable_and_are_saved_once(
    visit: Visit, store: Store, add: Add, server: Server
) -> None:
    add(4)
    page = visit("anna", may_fail=True)
    press(page, "ArrowUp")
    wait_saved(page)
    server.stop()
    press(page, "ArrowUp")
    wait_text(page, "[data-unsaved]", "1 label")
    page.keyboard.press("ArrowUp")
    wait_text(page, "[data-unsaved]", "2 labels")
    assert store.labelled("anna") == 1
    page.get_by_role("button", name="Change name").click()
    wait_text(page, "[data-message]", "2 labels")
    with Server(create_app(store), port=server.port):
        wait_saved(page)
        assert not page.locator("[data-unsaved]").is_visible()
        page.locator('#question [data-question="4"]').wait_for()
        page.close()
    assert [label.comparison_id for label in store.labels()] == [1, 2, 3]


@pytest.mark.parametrize("arrives", [False, True])
def test_a_label_lost_on_the_network_survives_a_reload_and_counts_once(
    visit: Visit, store: Store, add: Add, arrives: bool
) -> None:
    add(3)
    page = visit("anna", may_fail=True)

    def lose(route: Any) -> None:
        if arrives:
            route.fetch()  # the server takes it, but the browser never hears of it
        route.abort("connectionreset")

    page.route("**/answer", lose)
    page.keyboard.press("ArrowUp")
    wait_text(page, "[data-unsaved]", "1 label")
    assert store.labelled("anna") == arrives
    page.unroute_all(behavior="ignoreErrors")
    page.reload()
    wait_saved(page)
    assert number_on(page) == 2
    assert not page.locator("[data-message]").is_visible()
    assert [label.comparison_id for label in store.labels()] == [1]
    assert store.last_event() == 1


def test_a_label_that_comes_too_late_is_reported(visit: Visit, store: Store, add: Add) -> None:
    add(2)
    page = visit("anna", may_fail=True)
    store.release("anna")
    question = store.ask("bert")[0]
    store.add_label(question.id, "bert", token="t", choice="tie")
    assert question.id == number_on(page)
    press(page, "ArrowUp")
    wait_text(page, "[data-message]", "question 1")
    assert [label.annotator for label in store.labels()] == ["bert"]


def test_a_refused_question_can_be_put_to_the_same_person_again(visit: Visit, store: Store, add: Add) -> None:
    add(2)
    page = visit("anna", may_fail=True)
    store.release("anna")
    store.ask("bert")
    press(page, "ArrowUp")
    wait_text(page, "[data-message]", "question 1")
    store.release("bert")
    assert number_on(page) == 2
    press(page, "ArrowUp")
    assert number_on(page) == 1
    press(page, "ArrowUp")
    wait_saved(page)
    assert [label.annotator for label in store.labels()] == ["anna", "anna"]


def test_a_question_that_was_leased_to_another_annotator_disappears(visit: Visit, store: Store, add: Add) -> None:
    add(3)
    page = visit("anna")
    store.release("anna")
    store.ask("bert")
    page.evaluate(LOOK_AGAIN)
    wait_text(page, "[data-message]", "another annotator")
    assert number_on(page) == 2
    press(page, "ArrowUp")
    wait_saved(page)
    assert [label.comparison_id for label in store.labels()] == [2]


def test_a_label_is_never_saved_in_another_store(
    visit: Visit, store: Store, add: Add, server: Server, tmp_path: Path
) -> None:
    """It waits for its own one, which may be served again."""
    add(3)
    page = visit("anna", may_fail=True)
    press(page, "ArrowUp")
    wait_saved(page)
    server.stop()
    press(page, "ArrowLeft")
    wait_text(page, "[data-unsaved]", "1 label")
    with Store(tmp_path / "other.db", seed=1) as other:
        other.add([Comparison(prompt=f"Other {i}", responses=("x", "y")) for i in range(3)])
        with Server(create_app(other), port=server.port):
            wait_text(page, "[data-message]", "another store")
            page.get_by_role("link", name="Reload the page.").click()
            page.get_by_text("Other 0").wait_for()
            wait_ready(page)
            press(page, "ArrowDown")
            wait_saved(page)
            stale = another_tab(page)
            assert number_on(stale) == 2
        assert [(label.comparison_id, label.choice) for label in other.labels()] == [(1, "cant_tell")]
    with Server(create_app(store), port=server.port):
        stale.evaluate(LOOK_AGAIN)  # finds out by itself
        stale.get_by_text("Question 2?").wait_for()
        wait_saved(stale)
        stale.close()
        page.close()
    assert [label.comparison_id for label in store.labels()] == [1, 2]


def test_a_name_that_begins_like_another_one_does_not_send_their_labels(visit: Visit, store: Store, add: Add) -> None:
    add(4)
    page = visit("anna b", may_fail=True)
    address = page.url
    page.route("**/answer", lambda route: route.abort("connectionreset"))
    page.keyboard.press("ArrowUp")
    wait_text(page, "[data-unsaved]", "1 label")
    page.unroute_all(behavior="ignoreErrors")
    for name, answered in (("anna", 0), ("anna b", 1)):
        page.goto("about:blank")
        page.context.clear_cookies()
        page.goto(address)
        enter(page, name)
        wait_ready(page)
        wait_saved(page)
        assert store.labelled("anna b") == answered
    assert [(label.comparison_id, label.annotator) for label in store.labels()] == [(1, "anna b")]


def test_two_tabs_of_one_person(visit: Visit, store: Store, add: Add) -> None:
    add(4)
    first = visit("anna", may_fail=True)
    second = another_tab(first)
    assert number_on(first) == number_on(second) == 1
    press(first, "ArrowUp")
    wait_saved(first)
    press(second, "ArrowDown")
    wait_text(second, "[data-message]", "question 1")
    press(second, "ArrowDown")
    wait_saved(second)
    assert [(label.comparison_id, label.choice) for label in store.labels()] == [(1, "tie"), (2, "cant_tell")]


def test_an_undo_sent_by_another_tab_is_done_for_both(visit: Visit, store: Store, add: Add) -> None:
    add(4)
    first = visit("anna", may_fail=True)
    press(first, "ArrowUp")
    wait_saved(first)
    first.context.route("**/undo", lambda route: route.abort("connectionreset"))
    first.keyboard.press("u")
    wait_text(first, "[data-unsaved]", "1 label")
    second = another_tab(first)
    wait_text(second, "[data-unsaved]", "1 label")
    second.route("**/undo", lambda route: route.abort("connectionreset"))
    first.context.unroute_all(behavior="ignoreErrors")
    wait_saved(first)
    wait_saved(second)
    assert store.labelled("anna") == 0
    press(second, "ArrowDown")
    wait_saved(second)
    assert store.labelled("anna") == 1


def test_a_page_of_one_person_never_shows_the_questions_of_the_next(visit: Visit, store: Store, add: Add) -> None:
    add(4)
    page = visit("anna", may_fail=True)
    tab = another_tab(page)
    page.evaluate(HIDE, True)  # as whatever is behind another tab
    tab.get_by_role("button", name="Change name").click()
    enter(tab, "bert")
    wait_ready(tab)
    page.evaluate(HIDE, False)
    wait_text(page, ".who .name", "bert")
    wait_ready(page)
    press(page, "ArrowUp")
    wait_saved(page)
    assert [label.annotator for label in store.labels()] == ["bert"]


def test_a_label_waits_for_the_next_login(visit: Visit, store: Store, add: Add) -> None:
    add_account(store, "anna", "annotator", PASSWORD)
    add(3)
    page = visit("anna", password=PASSWORD, may_fail=True)
    press(page, "ArrowUp")
    wait_saved(page)
    (session,) = (cookie["value"] for cookie in page.context.cookies() if cookie["name"] == SESSION_COOKIE)
    store.remove_login(hash_token(session))
    press(page, "ArrowUp")
    wait_text(page, "[data-message]", "1 label")
    page.get_by_role("link", name="Log in to save.").click()
    enter(page, "anna", PASSWORD)
    wait_ready(page)
    wait_saved(page)
    assert number_on(page) == 3
    assert [label.comparison_id for label in store.labels()] == [1, 2]


def test_a_label_is_saved_even_if_the_page_is_closed_at_once(visit: Visit, add: Add) -> None:
    """The browser sends the request even after the page is closed."""
    add(2)
    page = visit("anna")
    page.evaluate("""() => {
      window.kept = [];
      const send = fetch;
      window.fetch = (path, options) => (kept.push([path, options.keepalive]), send(path, options));
    }""")
    press(page, "ArrowUp")
    wait_saved(page)
    assert ["/answer", True] in page.evaluate("kept")


def test_more_tabs_can_be_open_than_a_browser_has_connections(visit: Visit, store: Store, add: Add) -> None:
    """Chromium opens six to one host; a hidden tab keeps none."""
    page = visit("anna")
    tabs = [page]
    for _ in range(6):
        tabs[-1].evaluate(HIDE, True)
        tabs.append(another_tab(page))
    wait_empty(page)
    for tab in tabs[1:]:
        tab.evaluate(HIDE, True)
    add(1)
    assert page.locator("#question .question").count() == 0
    page.evaluate(HIDE, False)
    wait_question(page)

"""The page in a real browser, by keyboard, on a real store: what people do, and what may go wrong while they do it."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from payloads import PAYLOADS

from deep_rlhf.feedback.records import Alarm, AnnotatorFigures, Comparison, Version
from deep_rlhf.feedback.store import Store
from deep_rlhf.web import events
from deep_rlhf.web.app import create_app
from deep_rlhf.web.server import Server

Add = Callable[..., list[int]]
Visit = Callable[..., Any]
TIMEOUT = 15_000  # milliseconds, on a busy machine
FAILED = "Failed to load resource: "  # while the server is away, or refuses an answer


@pytest.fixture(autouse=True)
def _quick_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_EVERY", 0.1)


@pytest.fixture
def server(store: Store) -> Iterator[Server]:
    with Server(create_app(store)) as running:
        yield running


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """visit("anna"): her page in a browser of her own. Nothing may go wrong in it, unless it `may_fail`."""
    problems: list[str] = []
    contexts = []

    def visit(name: str, *, size: tuple[int, int] = (1280, 800), may_fail: bool = False, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning") and not (may_fail and message.text.startswith(FAILED)):
                problems.append(message.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        page.get_by_label("Name").fill(name)
        page.get_by_role("button", name="Begin").click()
        if options.get("java_script_enabled", True):
            page.locator("#question[data-unsent]").wait_for()
            wait_painted(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def number_on(page: Any) -> int:
    """The number of the question on the screen."""
    return int(page.locator("#question .question").get_attribute("data-question"))


def press(page: Any, key: str) -> None:
    """Presses a key that ends a question, and waits until it is gone from the screen."""
    before = number_on(page)
    page.keyboard.press(key)
    page.locator(f'#question [data-question="{before}"]').wait_for(state="detached")


def wait_saved(page: Any) -> None:
    """Until nothing is unsent."""
    page.locator('#question[data-unsent="0"]').wait_for()


def wait_painted(page: Any) -> None:
    """Until the browser has drawn the page: it drops what is pressed before."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def open_model(page: Any) -> None:
    """Goes to the second tab, and waits until it has its style."""
    page.get_by_role("link", name="Model").click()
    page.get_by_role("heading", name="How the model changes").wait_for()
    page.wait_for_load_state("load")
    wait_painted(page)


def wait_text(page: Any, selector: str, text: str) -> None:
    page.locator(selector, has_text=text).first.wait_for()


def test_a_session_by_keyboard(visit: Visit, store: Store, add: Add) -> None:
    add(6)
    page = visit("anna")
    order = []
    for keys in (["ArrowLeft"], ["3", "ArrowRight"], ["ArrowUp"], ["ArrowDown"], ["4", "4", "ArrowLeft"], ["s"]):
        order.append(number_on(page))
        for key in keys[:-1]:
            page.keyboard.press(key)
        press(page, keys[-1])
    wait_text(page, "#question h1", "No question just now")
    wait_saved(page)
    assert order == [1, 2, 3, 4, 5, 6]
    labels = {label.comparison_id: label for label in store.labels()}
    assert sorted(labels) == [1, 2, 3, 4, 5]
    left = {number: "ab"[label.shown_order[0]] for number, label in labels.items()}
    right = {number: "ab"[label.shown_order[1]] for number, label in labels.items()}
    assert [labels[i].choice for i in (1, 2, 3, 4, 5)] == [left[1], right[2], "tie", "cant_tell", left[5]]
    assert [labels[i].strength for i in (1, 2, 3, 4, 5)] == [None, 3, None, None, None]
    assert {label.annotator for label in labels.values()} == {"anna"}
    assert all(0 < label.seconds < 60 for label in labels.values())
    wait_text(page, "[data-answered]", "5")
    add("Late?", "x", "y")  # and it appears by itself
    wait_text(page, "#question h1", "Which answer is better?")
    assert number_on(page) == 7


def test_what_is_on_the_left_is_what_is_recorded(visit: Visit, store: Store, add: Add) -> None:
    add(8)
    page = visit("anna")
    shown = {}
    for _ in range(8):
        shown[number_on(page)] = page.locator("#question .answer .text").first.inner_text()
        press(page, "ArrowLeft")
    wait_saved(page)
    for label in store.labels():
        index = label.shown_order[0]
        assert shown[label.comparison_id] == label.comparison.answers[index]
        assert label.choice == "ab"[index]
    assert {label.choice for label in store.labels()} == {"a", "b"}


def test_help_is_opened_and_closed_by_keyboard_and_keys_wait_meanwhile(visit: Visit, store: Store, add: Add) -> None:
    add(1)
    page = visit("anna")
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys").wait_for()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    assert number_on(page) == 1
    assert store.last_event() == 0


def test_undo_takes_back_and_asks_again(visit: Visit, store: Store, add: Add) -> None:
    add(3)
    page = visit("anna")
    press(page, "ArrowUp")
    press(page, "ArrowUp")
    assert number_on(page) == 3
    for expected in (2, 1):
        page.keyboard.press("u")
        page.locator(f'#question [data-question="{expected}"]').wait_for()
    page.keyboard.press("u")
    wait_text(page, "[data-message]", "There is no answer to take back.")
    for expected in (1, 2, 3):
        assert number_on(page) == expected
        press(page, "ArrowDown")
    wait_saved(page)
    assert {label.comparison_id: label.choice for label in store.labels()} == dict.fromkeys((1, 2, 3), "cant_tell")


def test_a_reload_shows_the_same_question_with_the_same_sides(visit: Visit, store: Store, add: Add) -> None:
    add(20)
    page = visit("anna")
    press(page, "ArrowLeft")
    before = page.locator("#question .answers").inner_text()
    for _ in range(3):
        page.reload()
        assert page.locator("#question .answers").inner_text() == before
    wait_painted(page)
    press(page, "ArrowLeft")
    wait_saved(page)
    assert [label.comparison_id for label in store.labels()] == [1, 2]


def test_two_annotators_never_have_the_same_question(visit: Visit, store: Store, add: Add) -> None:
    add(12)
    pages = [visit("anna"), visit("bert")]
    seen: list[int] = []
    for _ in range(6):
        for page in pages:
            seen.append(number_on(page))
            press(page, "ArrowRight")
    for page in pages:
        wait_text(page, "#question h1", "No question just now")
        wait_saved(page)
    assert sorted(seen) == list(range(1, 13))
    assert {(label.comparison_id, label.annotator) for label in store.labels()} == {
        (number, ("anna", "bert")[i % 2]) for i, number in enumerate(seen)
    }


def test_answers_wait_while_the_server_is_away_and_are_saved_once(
    visit: Visit, store: Store, add: Add, server: Server
) -> None:
    add(4)
    page = visit("anna", may_fail=True)
    press(page, "ArrowUp")
    wait_saved(page)
    server.stop()
    press(page, "ArrowUp")
    wait_text(page, "[data-unsaved]", "1 answer is not saved yet")
    page.keyboard.press("ArrowUp")
    wait_text(page, "[data-unsaved]", "2 answers are not saved yet")
    assert store.answered("anna") == 1
    page.get_by_role("button", name="Change name").click()
    wait_text(page, "[data-message]", "2 answers are not saved yet: wait before you leave.")
    with Server(create_app(store), port=server.port):
        wait_saved(page)
        assert not page.locator("[data-unsaved]").is_visible()
        page.locator('#question [data-question="4"]').wait_for()
        page.close()
    assert [label.comparison_id for label in store.labels()] == [1, 2, 3]


@pytest.mark.parametrize("arrives", [False, True])
def test_an_answer_that_was_lost_on_its_way_or_back_outlives_a_reload_and_counts_once(
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
    wait_text(page, "[data-unsaved]", "1 answer is not saved yet")
    assert store.answered("anna") == arrives
    page.unroute_all(behavior="ignoreErrors")
    page.reload()
    wait_saved(page)
    assert number_on(page) == 2
    assert not page.locator("[data-message]").is_visible()
    assert [label.comparison_id for label in store.labels()] == [1]
    assert store.last_event() == 1


def test_an_answer_that_comes_too_late_says_so(visit: Visit, store: Store, add: Add) -> None:
    add(2)
    page = visit("anna", may_fail=True)
    store.release("anna")
    question = store.ask("bert")[0]
    store.answer(question.id, "bert", token="t", choice="tie")
    assert question.id == number_on(page)
    press(page, "ArrowUp")
    wait_text(page, "[data-message]", "Somebody else has question 1 by now")
    assert [label.annotator for label in store.labels()] == ["bert"]


def test_a_ranking_by_keyboard_and_by_mouse(visit: Visit, store: Store, add: Add) -> None:
    for i in range(3):
        add(f"Rank {i}", "one", "two", "three", "four")
    page = visit("anna")
    for key in ("2", "4", "4", "=", "1", "Backspace", "1", "Enter"):
        page.keyboard.press(key)
    page.locator('#question [data-question="2"]').wait_for()
    for key in ("3", "=", "1", "Enter"):
        page.keyboard.press(key)
    wait_text(page, "[data-message]", "2 answers have no rank yet.")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.locator('#question [data-question="3"]').wait_for()
    for answer, rank in ((1, 2), (2, 2), (3, 1), (4, 4)):
        page.get_by_role("group", name=f"Rank of answer {answer}").get_by_role("radio", name=str(rank)).check()
    page.get_by_role("button", name="Save this order").click()
    wait_text(page, "#question h1", "No question just now")
    wait_saved(page)
    by_place = []
    for label in store.labels():
        assert label.ranks is not None
        by_place.append([label.ranks[index] for index in label.shown_order])
    assert by_place == [[3, 1, 4, 2], [1, 2, 1, 3], [2, 2, 1, 3]]


def test_arrows_move_within_the_strengths_when_these_have_the_focus(visit: Visit, store: Store, add: Add) -> None:
    add(2)
    page = visit("anna")
    page.get_by_role("radio", name="slightly").focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="clearly").is_checked()
    page.keyboard.press("Enter")  # must not press the form's first button
    assert number_on(page) == 1
    page.get_by_role("button", name="B is better").click()
    page.locator('#question [data-question="2"]').wait_for()
    wait_saved(page)
    assert [label.strength for label in store.labels()] == [2]


def test_the_page_works_without_scripts(visit: Visit, store: Store, add: Add) -> None:
    add(2)
    page = visit("anna", java_script_enabled=False)

    def press(name: str, role: str = "button") -> None:
        with page.expect_navigation():
            page.get_by_role(role, name=name).click()

    page.get_by_role("radio", name="much").check()
    press("A is better")
    assert number_on(page) == 2
    press("Undo")
    assert number_on(page) == 1
    press("Tie")
    press("Skip")
    page.get_by_role("heading", name="No question just now").wait_for()
    assert [(label.comparison_id, label.choice) for label in store.labels()] == [(1, "tie")]
    press("Model", role="link")
    page.get_by_role("heading", name="How the model changes").wait_for()


# ---- the second tab


def test_the_model_tab_shows_the_loop_and_changes_by_itself(visit: Visit, store: Store, add: Add) -> None:
    add(3)
    page = visit("anna")
    press(page, "ArrowUp")
    wait_saved(page)
    store.add_metrics([{"step": i, "reward": i / 10, "kl": i / 4, "sqrt_kl": (i / 4) ** 0.5} for i in range(1, 9)])
    for number in (0, 1):
        store.add_version(Version(kind="policy", number=number, step=5 * number, labels=number, last_event=number))
        store.add_samples(number, [("\n\nHuman: Fixed?\n\nAssistant:", f"answer of version {number}")])
    store.add_version(Version(kind="reward", number=1, step=4, labels=1, last_event=1))
    store.put("win_rate", {"rate": 0.63, "low": 0.4, "high": 0.8, "answers": 16})
    store.put("outlook", {"next": 100, "accuracy_now": 0.61, "accuracy_then": 0.68, "text": "It will foresee 68%."})
    store.put("choosing", {"chosen": {"answers": 12, "accuracy": 0.5, "informative": 0.3}, "random": {"answers": 3}})
    store.put("alpha", 0.37)
    figures = AnnotatorFigures(name="anna", answers=1, error_rate=0.1, error_rate_interval=(0.02, 0.5), agreement=0.75)
    store.set_annotators([figures])
    open_model(page)
    for text in (
        *("63%", "40% to 80%, by 16 blind answers", "61% → 68%", "It will foresee 68%.", "0.37", "None so far."),
        *("Too few answers to say", "answer of version 0", "answer of version 1", "reward 1, update 5", "50% to 98%"),
    ):
        page.get_by_text(text).first.wait_for()
    for name in ("Reward", "Distance from the start", "Reward against distance"):
        page.get_by_role("img", name=name, exact=True).wait_for()
    page.locator("figure").first.get_by_text("Numbers").click()
    page.get_by_role("columnheader", name="reward", exact=True).wait_for()
    page.evaluate("document.activeElement.blur()")
    # What follows comes by itself, and the open table stays open.
    store.put("status", {"state": "training", "step": 9, "text": "Update 9 is under way."})
    message = "Answers are 3.00 times as long."
    store.add_alarm(Alarm(name="length_ratio", step=9, action="roll_back", message=message, figure=3, limit=2))
    store.add_version(Version(kind="policy", number=2, step=9, labels=1, last_event=1))
    store.add_samples(2, [("\n\nHuman: Fixed?\n\nAssistant:", "answer of version 2")])
    for text in ("Update 9 is under way.", message, "rolled back", "answer of version 2"):
        page.get_by_text(text).first.wait_for()
    page.get_by_role("columnheader", name="reward", exact=True).wait_for()
    page.get_by_label("Left").select_option("1")
    page.get_by_text("answer of version 1").wait_for()
    assert not page.get_by_text("answer of version 0").is_visible()


def test_the_red_button_asks_first_and_stops_everything(visit: Visit, store: Store) -> None:
    page = visit("anna")
    open_model(page)
    button = page.get_by_role("button", name="Yes, stop the trainer")
    assert not button.is_visible()
    page.get_by_text("Stop everything …").click()
    button.click()
    page.get_by_text("Stopped by anna").wait_for()
    assert store.get("stop")["by"] == "anna"


# ---- for everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_answers_one_above_the_other_and_never_scrolls_sideways(
    visit: Visit, store: Store, add: Add, scheme: str
) -> None:
    wide = "w" * 300 + " |a|b|c|d|e|f|g|h|"
    store.add([Comparison(prompt="Hello " + wide, answers=(wide, "```\n" + wide + "\n```"))])
    store.add([Comparison(prompt="Rank", answers=tuple(wide + str(i) for i in range(9)))])
    store.add_samples(0, [("Fixed " + wide, wide)])
    store.add_metrics([{"step": i, "reward": 1e-7 * i, "sqrt_kl": 1e6 * i} for i in range(5)])
    page = visit("a" * 60, size=(360, 740), color_scheme=scheme)
    first, second = (page.locator("#question .answer").nth(i).bounding_box() for i in (0, 1))
    assert second["y"] >= first["y"] + first["height"]
    no_overflow = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="A is better").click()
    page.locator("#question .ranking").wait_for()
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="Keys").click()
    assert page.evaluate(no_overflow)
    page.keyboard.press("Escape")
    open_model(page)
    page.get_by_text("Stop everything …").click()
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="Yes, stop the trainer").wait_for()


def test_a_wide_screen_shows_two_answers_side_by_side(visit: Visit, add: Add) -> None:
    add("Hello", "x " * 400, "y")
    page = visit("anna")
    first, second = (page.locator("#question .answer").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"]
    assert second["x"] >= first["x"] + first["width"]


CONTRAST = """() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => {
      const c = v / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!color.endsWith(", 0)") && color !== "transparent") return color;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *:not(template):not(script)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [luminance(color), luminance(behind(element))].sort();
    if ((b + 0.05) / (a + 0.05) < 4.5) poor.push(`${element.tagName} ${element.textContent.trim()} ${color}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_controls_have_names(visit: Visit, store: Store, add: Add, scheme: str) -> None:
    add("Hello", "x [a](http://b.example) `c`", "y")
    store.add_metrics([{"step": i, "reward": i, "held_out_reward": i / 2, "sqrt_kl": i} for i in range(3)])
    store.add_samples(0, [("Fixed", "answer")])
    for action in ("warn", "stop"):
        store.add_alarm(Alarm(name="kl", step=1, action=action, message="Far away.", figure=1, limit=0))  # type: ignore[arg-type]
    store.put("stop", {"by": "root", "at": "2026-01-02T03:04:05+00:00"})
    page = visit("anna", color_scheme=scheme)
    page.keyboard.press("2")
    assert page.evaluate(CONTRAST) == []
    names = ["A is better", "Tie", "Can't tell", "B is better", "Skip", "Undo", "Keys", "Change name"]
    for name in names:
        page.get_by_role("button", name=name).wait_for()
    assert page.get_by_role("radio").count() == 4
    page.get_by_role("group", name="How much better?").wait_for()
    page.get_by_role("region", name="Answer A").wait_for()
    assert page.get_by_role("link", name="Label").get_attribute("aria-current") == "page"
    assert page.locator("h1").count() == 1
    open_model(page)
    assert page.evaluate(CONTRAST) == []
    assert page.locator("select").count() == page.get_by_label("Left").count() + page.get_by_label("Right").count() == 2
    assert page.locator("h1").count() == 1


def test_focus_is_seen_and_moves_to_the_new_question(visit: Visit, add: Add) -> None:
    add(2)
    page = visit("anna")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(page, "ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == "Which answer is better?"
    assert page.locator("[data-said]").inner_text() == "Next question."


def test_no_payload_runs_or_loads_anything(visit: Visit, store: Store) -> None:
    """Answered one after the other, so that each goes through the script's own path too; then the second tab."""
    payloads = [payload.replace("\ud83d", "").replace("\0", "") for payload in PAYLOADS]
    store.add([Comparison(prompt=payload, answers=(payload, "x")) for payload in payloads])
    store.add_samples(0, [(payload, payload) for payload in payloads])
    page = visit("anna")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for _ in payloads:
        assert page.title() == "Label · Deep RLHF"
        press(page, "ArrowUp")
    wait_saved(page)
    open_model(page)
    page.get_by_text("somebody else").first.wait_for()
    assert page.title() == "Model · Deep RLHF"
    assert [url for url in asked if "evil" in url or not url.startswith("http://127.0.0.1")] == []
    with suppress(Exception):
        page.evaluate("document.querySelectorAll('.text *').forEach((element) => element.click?.())")
    assert page.title() == "Model · Deep RLHF"
    assert "/model" in page.url

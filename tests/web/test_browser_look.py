"""The model tab in a real browser; both tabs on a phone, their contrast and names, and hostile text."""

from contextlib import suppress

import pytest
from page_keys import Add, Visit, open_model, press, wait_saved
from payloads import PAYLOADS

from deep_rlhf.feedback.records import Alarm, AnnotatorFigures, Comparison, Version
from deep_rlhf.feedback.state import ANNOTATORS
from deep_rlhf.feedback.store import Store

pytestmark = pytest.mark.browser


def test_the_model_tab_shows_the_loop_and_changes_by_itself(visit: Visit, store: Store, add: Add) -> None:
    add(3)
    page = visit("anna")
    press(page, "ArrowUp")
    wait_saved(page)
    store.add_metrics([{"step": i, "reward": i / 10, "kl": i / 4, "sqrt_kl": (i / 4) ** 0.5} for i in range(1, 9)])
    for number in (0, 1):
        store.add_version(Version(kind="policy", number=number, step=5 * number, labels=number, last_event=number))
        store.add_samples(number, [("\n\nHuman: Fixed?\n\nAssistant:", f"response of version {number}")])
    store.add_version(Version(kind="reward", number=1, step=4, labels=1, last_event=1))
    store.put("win_rate", {"rate": 0.63, "low": 0.4, "high": 0.8, "answers": 16, "first": 1, "last": 1})
    store.put("outlook", {"next": 100, "accuracy_now": 0.61, "accuracy_then": 0.68, "text": "It will predict 68%."})
    store.put("choosing", {"chosen": {"answers": 12, "accuracy": 0.5, "informative": 0.3}, "random": {"answers": 3}})
    store.put("alpha", 0.37)
    figures = AnnotatorFigures(name="anna", labels=1, error_rate=0.1, error_rate_interval=(0.02, 0.5), agreement=0.75)
    ANNOTATORS.write(store, [figures])
    open_model(page)
    for text in (
        *("63%", "40% to 80%, from 16 blind labels", "61% → 68%", "It will predict 68%.", "0.37", "No alarms."),
        *("Too few labels", "response of version 0", "response of version 1", "reward model 1, update 5", "50% to 98%"),
    ):
        page.get_by_text(text).first.wait_for()
    for name in ("Reward", "Distance from the start", "Reward against distance"):
        page.get_by_role("img", name=name, exact=True).wait_for()
    page.locator("figure").first.get_by_text("Numbers").click()
    page.get_by_role("columnheader", name="reward", exact=True).wait_for()
    page.evaluate("document.activeElement.blur()")
    # What follows comes by itself, and the open table stays open.
    store.put("status", {"state": "training", "step": 9, "text": "Update 9 is under way."})
    message = "Responses are 3.00 times as long."
    store.add_alarm(Alarm(name="length_ratio", step=9, action="roll_back", message=message, figure=3, limit=2))
    store.add_version(Version(kind="policy", number=2, step=9, labels=1, last_event=1))
    store.add_samples(2, [("\n\nHuman: Fixed?\n\nAssistant:", "response of version 2")])
    for text in ("Update 9 is under way.", message, "rolled back", "response of version 2"):
        page.get_by_text(text).first.wait_for()
    page.get_by_role("columnheader", name="reward", exact=True).wait_for()
    page.get_by_label("Left").select_option("1")
    page.get_by_text("response of version 1").wait_for()
    assert not page.get_by_text("response of version 0").is_visible()


def test_status_and_alarms_change_while_the_figures_have_the_focus(visit: Visit, store: Store) -> None:
    store.add_metrics([{"step": i, "reward": i / 10} for i in range(3)])
    page = visit("anna")
    open_model(page)
    page.locator("figure summary").first.focus()
    store.put("status", {"state": "training", "step": 9, "text": "Update 9 is under way."})
    message = "Responses are 3.00 times as long."
    store.add_alarm(Alarm(name="length_ratio", step=9, action="warn", message=message, figure=3, limit=2))
    live = page.locator("[aria-live=polite]")
    for text in ("Update 9 is under way.", message):
        live.get_by_text(text).wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Numbers"
    assert live.locator("a, button, summary, input, select, [tabindex]").count() == 0  # or they would keep it back
    # What has not changed is not replaced: it would be read aloud again.
    page.evaluate("document.querySelector('#status .status').dataset.same = 'yes'")
    with page.expect_response("**/model/status"):
        store.put("alpha", 0.5)
    page.locator("#status .status[data-same]").wait_for()
    store.put("status", {"state": "training", "step": 10, "text": "Update 10 is under way."})
    live.get_by_text("Update 10 is under way.").wait_for()


def test_the_red_button_asks_first_and_stops_everything(visit: Visit, store: Store) -> None:
    store.put("status", {"state": "training", "step": 9, "text": "Update 9 is under way."})
    page = visit("anna")
    open_model(page)
    button = page.get_by_role("button", name="Yes, stop the trainer")
    assert not button.is_visible()
    page.locator("#stop summary").click()
    button.click()
    page.get_by_text("by anna").wait_for()
    assert store.get("stop")["by"] == "anna"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_responses_one_above_the_other_and_never_scrolls_sideways(
    visit: Visit, store: Store, add: Add, scheme: str
) -> None:
    wide = "w" * 300 + " |a|b|c|d|e|f|g|h|"
    table = f"| {'w' * 300} | b |\n|---|---|\n| c | d |"
    store.add([Comparison(prompt="Hello " + wide, responses=(wide, "```\n" + wide + "\n```"))])
    store.add([Comparison(prompt=table, responses=(table, "x"))])
    store.add([Comparison(prompt="Rank", responses=tuple(wide + str(i) for i in range(9)))])
    store.add_samples(0, [("Fixed " + wide, wide)])
    store.add_metrics([{"step": i, "reward": 1e-7 * i, "sqrt_kl": 1e6 * i} for i in range(5)])
    page = visit("a" * 60, size=(360, 740), color_scheme=scheme)
    first, second = (page.locator("#question .response").nth(i).bounding_box() for i in (0, 1))
    assert second["y"] >= first["y"] + first["height"]
    no_overflow = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="A is better").click()
    page.locator('#question [data-question="2"]').wait_for()
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="A is better").click()
    page.locator("#question .ranking").wait_for()
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="Keys").click()
    assert page.evaluate(no_overflow)
    page.keyboard.press("Escape")
    open_model(page)
    page.locator("#stop summary").click()
    assert page.evaluate(no_overflow)
    page.get_by_role("button", name="Yes, stop the trainer").wait_for()


def test_a_wide_screen_shows_two_responses_side_by_side(visit: Visit, add: Add) -> None:
    add("Hello", "x " * 400, "y")
    page = visit("anna")
    first, second = (page.locator("#question .response").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"]
    assert second["x"] >= first["x"] + first["width"]


CONTRAST = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => {
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
  const opacity = (element) => {
    let product = 1;
    for (let at = element; at; at = at.parentElement) product *= Number(getComputedStyle(at).opacity);
    return product;
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *:not(template):not(script)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    const [front, back, share] = [parts(color), parts(behind(element)), opacity(element)];
    const seen = front.map((v, i) => share * v + (1 - share) * back[i]);
    const [a, b] = [luminance(seen), luminance(back)].sort((one, other) => one - other);
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
        store.add_alarm(Alarm(name="kl", step=1, action=action, message="Far away.", figure=1, limit=0))
    store.put("stop", {"by": "root", "at": "2026-01-02T03:04:05+00:00"})
    store.put("status", {"state": "training", "text": "Update 1.", "at": "2026-01-02T03:04:05+00:00"})
    store.put("heartbeat", "2026-01-02T03:04:06+00:00")
    page = visit("anna", color_scheme=scheme)
    page.keyboard.press("2")
    assert page.evaluate(CONTRAST) == []
    names = ["A is better", "Tie", "Can't tell", "B is better", "Skip", "Undo", "Keys", "Change name"]
    for name in names:
        page.get_by_role("button", name=name).wait_for()
    assert page.get_by_role("radio").count() == 4
    page.get_by_role("group", name="How much better?").wait_for()
    page.get_by_role("region", name="Response A").wait_for()
    assert page.get_by_role("link", name="Label").get_attribute("aria-current") == "page"
    assert page.locator("h1").count() == 1
    open_model(page)
    assert page.evaluate(CONTRAST) == []
    assert page.locator("select").count() == page.get_by_label("Left").count() + page.get_by_label("Right").count() == 2
    assert page.locator("h1").count() == 1


def test_no_payload_runs_or_loads_anything(visit: Visit, store: Store) -> None:
    """Answered one after the other, so that each goes through the script's own path too; then the second tab."""
    payloads = [payload.replace("\ud83d", "").replace("\0", "") for payload in PAYLOADS]
    store.add([Comparison(prompt=payload, responses=(payload, "x")) for payload in payloads])
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

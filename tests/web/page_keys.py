"""What people do on the page in a real browser, and what they wait for."""

from collections.abc import Callable
from typing import Any

Add = Callable[..., list[int]]
Visit = Callable[..., Any]
TIMEOUT = 60_000  # milliseconds: reached only where something hangs, on a busy machine, too


def enter(page: Any, name: str, password: str | None = None) -> None:
    """Starts under a name, or logs in."""
    page.get_by_label("Name").fill(name)
    if password is not None:
        page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Start" if password is None else "Log in").click()


def another_tab(page: Any) -> Any:
    """Opens the same page in another tab of the same browser."""
    tab = page.context.new_page()
    tab.goto(page.url)
    wait_ready(tab)
    return tab


def number_on(page: Any) -> int:
    """The number of the question on the screen."""
    return int(page.locator("#question .question").get_attribute("data-question"))


def press(page: Any, key: str) -> None:
    """Presses a key that ends a question, and waits until the question is gone."""
    before = number_on(page)
    page.keyboard.press(key)
    page.locator(f'#question [data-question="{before}"]').wait_for(state="detached")


def wait_ready(page: Any) -> None:
    """Waits until the script of the labelling tab has started."""
    page.locator("#question[data-unsent]").wait_for()
    wait_painted(page)


def wait_saved(page: Any) -> None:
    """Waits until nothing is unsent."""
    page.locator('#question[data-unsent="0"]').wait_for()


def wait_painted(page: Any) -> None:
    """Waits until the browser has drawn the page: it drops keys pressed before."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def open_model(page: Any) -> None:
    """Opens the model tab, and waits until its style sheet is loaded."""
    page.get_by_role("link", name="Model").click()
    page.locator("#status").wait_for()
    page.wait_for_load_state("load")
    wait_painted(page)


def wait_text(page: Any, selector: str, text: str) -> None:
    page.locator(selector, has_text=text).first.wait_for()


def wait_question(page: Any) -> None:
    """Waits until a question is on the screen."""
    page.locator("#question .question").wait_for()


def wait_empty(page: Any) -> None:
    """Waits until the page says that there is no question."""
    page.locator("#question .waiting").wait_for()

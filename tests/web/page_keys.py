"""What a person does on the page in a real browser, and what he waits for."""

from collections.abc import Callable
from typing import Any

Add = Callable[..., list[int]]
Visit = Callable[..., Any]
TIMEOUT = 60_000  # milliseconds: reached only where something hangs, on a busy machine, too


def enter(page: Any, name: str, password: str | None = None) -> None:
    """Begins under a name, or logs in."""
    page.get_by_label("Name").fill(name)
    if password is not None:
        page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Begin" if password is None else "Log in").click()


def another_tab(page: Any) -> Any:
    """The same person's page once more, in the same browser."""
    tab = page.context.new_page()
    tab.goto(page.url)
    wait_ready(tab)
    return tab


def number_on(page: Any) -> int:
    """The number of the question on the screen."""
    return int(page.locator("#question .question").get_attribute("data-question"))


def press(page: Any, key: str) -> None:
    """Presses a key that ends a question, and waits until it is gone from the screen."""
    before = number_on(page)
    page.keyboard.press(key)
    page.locator(f'#question [data-question="{before}"]').wait_for(state="detached")


def wait_ready(page: Any) -> None:
    """Until the script of the first tab has begun."""
    page.locator("#question[data-unsent]").wait_for()
    wait_painted(page)


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

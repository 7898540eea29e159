"""Takes the screenshots of docs/labelling.md: the page's two tabs on a store with example labels, in Chromium.

`python benchmarks/screenshots.py` writes the three of docs/images; with a FOLDER it writes more of them there. The
figures are made up.
"""

import argparse
import math
import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from deep_rlhf.feedback.records import Alarm, AnnotatorFigures, Comparison, Version
from deep_rlhf.feedback.state import (
    AGREEMENT,
    ANNOTATORS,
    FORECAST,
    SELECTION,
    STATUS,
    WIN_RATE,
    AccuracyForecast,
    ArmFigures,
    PolicyWinRate,
    SelectionFigures,
    Status,
)
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.app import create_app
from deep_rlhf.web.server import Server

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SHOTS = (
    ("label", (1280, 800), "light"),
    ("model", (1280, 800), "light"),
    ("label-phone", (360, 740), "light"),
)
MORE_SHOTS = (  # not in the documentation
    ("label-dark", (1280, 800), "dark"),
    ("model-dark", (1280, 800), "dark"),
    ("model-phone", (360, 740), "light"),
)
HH = "\n\nHuman: {}\n\nAssistant:"
DIALOGUE = (
    "\n\nHuman: My bread never rises. What am I doing wrong?"
    "\n\nAssistant: It may be the yeast. How warm is the water that you use?"
    "\n\nHuman: Straight from the kettle, so the yeast wakes up.\n\nAssistant:"
)
LONG = (
    "That is **too hot**: yeast dies above about 50 °C.\n\n"
    "1. Let the water cool until it feels lukewarm on your wrist.\n"
    "2. Stir in the yeast with a pinch of sugar and wait ten minutes; it should foam.\n"
    "3. Knead, cover, and give the dough an hour in a warm place.\n\n"
    "If it does not foam, the yeast is dead: buy a new packet."
)
SHORT = "Boiling water kills yeast. Use lukewarm water, about 35 °C, and check that the yeast foams before you knead."
QUESTIONS = [
    ("How do I get ink out of a cotton shirt?", "Dab it with alcohol, then wash it cold.", "It depends on the ink."),
    ("Why is the sky blue?", "Air scatters blue light more than red.", "Because of the ocean, mostly."),
    ("Write a thank-you note to my neighbour.", "Dear Anna, thank you so much for the soup!", "Thanks."),
    ("What should I pack for a weekend in the hills?", "Layers, rain jacket, water, a map.", "Clothes and food."),
    ("Can I plant tomatoes in May?", "Yes, after the last frost.", "Tomatoes are red fruits that people like to eat."),
]


def fill(store: Store) -> None:
    """A loop that has run for a while: questions, labels of three people, versions, metrics, an alarm."""
    rng = random.Random(3)
    reasons = ("variance", "random", "variance", "win_rate")
    comparisons = [
        Comparison(
            prompt=HH.format(prompt),
            responses=(good, bad),
            why_selected=reasons[i % 4],
            writers=(0, 4) if i % 4 == 3 else (),
            policy_version=i // 20,
            priority=100.0,
        )
        for i in range(84)
        for prompt, good, bad in [QUESTIONS[i % len(QUESTIONS)]]
    ]
    store.add(comparisons)
    for i in range(84):
        person = ("anna", "bert", "clara")[i % 3]
        question = store.ask(person)[0]
        choice = rng.choices(("a", "b", "tie"), (7, 2, 1))[0]
        seconds = rng.uniform(2.5, 7)
        store.add_label(question.id, person, token=f"{i}", choice=choice, strength=rng.randint(1, 4), seconds=seconds)
    store.add([Comparison(prompt=DIALOGUE, responses=(LONG, SHORT), why_selected="variance", priority=50)])
    store.add([Comparison(prompt=HH.format(prompt), responses=(a, b)) for prompt, a, b in QUESTIONS])
    _history(store, rng)


def _history(store: Store, rng: random.Random) -> None:
    rows = []
    for step in range(1, 61):
        kl = 6 * (1 - math.exp(-step / 25)) + rng.gauss(0, 0.15)
        reward = 1.5 * (1 - math.exp(-step / 22)) + rng.gauss(0, 0.08)
        rows.append(
            {
                "step": step,
                "reward": reward,
                "held_out_reward": reward * (0.95 - step / 200) + rng.gauss(0, 0.05),
                "kl": kl,
                "sqrt_kl": max(kl, 0) ** 0.5,
            }
        )
    store.add_metrics(rows)
    for number, step in enumerate((0, 12, 24, 36, 48, 60)):
        store.add_version(Version(kind="policy", number=number, step=step, labels=12 * number, last_event=16 * number))
        store.add_samples(number, [(HH.format(q), bad if number < 2 else good) for q, good, bad in QUESTIONS[:3]])
    for number, step in enumerate((0, 12, 24, 36, 48), start=1):
        store.add_version(Version(kind="reward", number=number, step=step, labels=12 * number, last_event=16 * number))
    message = "Responses are 2.10 times as long as at the start (limit 2)."
    store.add_alarm(Alarm(name="length_ratio", step=41, action="warn", message=message, figure=2.1, limit=2.0))
    people = (("anna", 0.06, 0.01, 0.17, 0.81), ("bert", 0.11, 0.04, 0.26, 0.74), ("clara", 0.34, 0.18, 0.55, 0.58))
    ANNOTATORS.write(
        store,
        [
            AnnotatorFigures(
                name=name,
                labels=28,
                error_rate=rate,
                error_rate_interval=(low, high),
                gold_right=2,
                gold_asked=2,
                repeats_same=2,
                repeats_asked=3,
                agreement=agreement,
            )
            for name, rate, low, high, agreement in people
        ],
    )
    STATUS.write(
        store,
        Status(
            state="training",
            step=60,
            text="Update 61: the policy writes, is scored and learns.",
            at=datetime(2026, 3, 14, 10, 12, tzinfo=UTC),
        ),
    )
    WIN_RATE.write(store, PolicyWinRate(rate=0.71, low=0.49, high=0.86, labels=21, first=4, last=5))
    AGREEMENT.write(store, 0.42)
    text = "The reward model predicts 71% of new labels correctly; after 100 more labels, 76% expected."
    FORECAST.write(store, AccuracyForecast(labels=63, accuracy_now=0.71, accuracy_then=0.76, text=text))
    SELECTION.write(
        store,
        SelectionFigures(
            chosen=ArmFigures(labels=42, accuracy=0.58, informative=0.21),
            random=ArmFigures(labels=21, accuracy=0.72, informative=0.13),
        ),
    )


def enter(page: Page, url: str, name: str) -> None:
    """Opens the labelling tab under a name."""
    page.goto(url)
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.wait_for_selector(".question")


def main() -> None:
    """Writes the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder for all screenshots (default: docs/images)")
    given = parser.parse_args().folder
    folder = given or Path(__file__).parents[1] / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, Store(Path(temporary) / "labels.db", seed=2) as store:
        fill(store)
        with Server(create_app(store)) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            for name, size, scheme in SHOTS + (MORE_SHOTS if given else ()):
                page = browser.new_page(
                    viewport={"width": size[0], "height": size[1]},
                    color_scheme=scheme,
                    device_scale_factor=2 if "phone" in name else 1,
                )
                enter(page, server.url, "anna")
                if "model" in name:
                    page.get_by_role("link", name="Model").click()
                    page.wait_for_selector("svg.chart")
                page.screenshot(path=folder / f"{name}.png", full_page="model" in name)
                page.close()
            browser.close()


if __name__ == "__main__":
    main()

"""The model tab without a browser: who sees which labels, and whether the trainer is alive."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from facts import assert_names
from page_client import HH, Client

from deep_rlhf.feedback.records import AnnotatorFigures, Comparison, Version
from deep_rlhf.feedback.state import ANNOTATORS, Status
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.access.auth import add_account
from deep_rlhf.web.app import WebSettings, create_app
from deep_rlhf.web.progress.view import silent_since

PASSWORD = "correct horse battery"
NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
SHOWN_LATER = "shown after the first use"


@pytest.fixture
def answered(store: Store) -> Callable[..., None]:
    """answered(1, 2) labels these of three questions; the third is a gold question."""
    gold = Comparison(prompt=HH.format("Gold?"), responses=("right", "wrong"), why_selected="gold", expected="a")
    store.add([Comparison(prompt=HH.format(f"Question {i}?"), responses=("first", "second")) for i in (1, 2)] + [gold])

    def answered(*numbers: int) -> None:
        for question in store.ask("bert", count=3):
            if question.id in numbers:
                store.add_label(question.id, "bert", token=f"t{question.id}", choice="a")

    return answered


def learn(store: Store, number: int) -> None:
    """A reward model learns from all labels."""
    last = store.last_event()
    store.add_version(Version(kind="reward", number=number, step=0, labels=last, last_event=last))
    ANNOTATORS.write(store, [AnnotatorFigures(name="bert", labels=2, error_rate=0.1, error_rate_interval=(0.0, 0.2))])


def test_every_label_can_be_traced_to_its_first_use(client: Client, store: Store) -> None:
    client.enter()
    store.add([Comparison(prompt=HH.format(f"Question {i:03}?"), responses=("first", "second")) for i in range(120)])
    for question in store.ask("bert", count=120):
        store.add_label(question.id, "bert", token=f"t{question.id}", choice="a")
        if question.id % 30 == 0:
            learn(store, question.id // 30)
    page, found = client.get("/model/labels").text, list[tuple[str, str]]()
    while True:
        found += re.findall(r"Question (\d+)\?.*?reward model (\d)", page)
        older = re.search(r'href="(/model/labels\?until=\d+)">Older', page)
        if older is None:
            break
        page = client.get(older[1]).text
        assert ">Newest<" in page
    assert found == [(f"{i:03}", f"{i // 30 + 1}") for i in reversed(range(120))]


def test_no_reward_model_learns_from_cant_tell(client: Client, store: Store) -> None:
    client.enter()
    store.add([Comparison(prompt=HH.format("Question?"), responses=("first", "second"))])
    (question,) = store.ask("bert")
    store.add_label(question.id, "bert", token="t", choice="cant_tell")
    learn(store, 1)
    page = client.get("/model").text
    assert "never (can't tell)" in page
    assert "reward model 1, update 1" not in page


def test_an_annotator_sees_no_label_before_a_reward_model_learned_from_it(
    store: Store, answered: Callable[..., None]
) -> None:
    for name, role in (("root", "admin"), ("anna", "annotator")):
        add_account(store, name, role, PASSWORD)  # type: ignore[arg-type]
    app = create_app(store, WebSettings(host="0.0.0.0"))
    anna, root = (Client(app, base_url="http://labels.example.org") for _ in range(2))
    anna.log_in("anna", PASSWORD)
    root.log_in("root", PASSWORD)
    for name in ("anna", "root"):
        store.release(name)
    answered(1, 3)
    for path in ("/model", "/model/history"):
        assert "Question 1?" not in anna.get(path).text
        page = root.get(path).text
        assert "Question 1?" in page
        assert ">gold<" in page
    learn(store, 1)
    answered(2)
    for path in ("/model", "/model/history"):
        page = anna.get(path).text
        assert "Question 1?" in page
        assert "Question 2?" not in page
        assert ">gold<" not in page
        assert "Reason for asking" not in page
        assert "only for measurement" not in page
        assert "Gold correct" not in page  # after each label it would tell which question was gold
        page = root.get(path).text
        assert "Question 2?" in page
        assert "Gold correct" in page
        assert page.count("only for measurement") == 1  # no reward model learns from the gold question


def test_without_accounts_reasons_are_shown_once_the_label_is_used(
    client: Client, store: Store, answered: Callable[..., None]
) -> None:
    client.enter()
    answered(3)
    page = client.get("/model").text
    assert "Gold?" in page
    assert ">gold<" not in page
    assert SHOWN_LATER in page
    learn(store, 1)
    page = client.get("/model").text
    assert ">gold<" in page
    assert SHOWN_LATER not in page


@pytest.mark.parametrize(
    ("state", "beat", "reported", "silent"),
    [
        ("training", 61, 90, 61),
        ("training", 59, 90, None),
        ("training", 300, 5, None),  # it has just begun, after a run that ended long ago
        ("training", 90, 70, 70),
        ("waiting for labels", 61, 90, 61),
        ("stopped", 300, 300, None),
        ("pretraining", 300, 100, None),
        (None, 300, None, None),
        ("training", None, 300, None),
    ],
)
def test_a_trainer_without_heartbeat_is_reported_after_a_minute(
    state: str | None, beat: int | None, reported: int | None, silent: int | None
) -> None:
    def ago(seconds: int | None) -> datetime | None:
        return None if seconds is None else NOW - timedelta(seconds=seconds)

    status = Status() if state is None else Status(state=state, at=ago(reported))
    found = silent_since(status, ago(beat), NOW)
    assert found == (None if silent is None else NOW - timedelta(seconds=silent))
    assert silent_since(status, None, NOW) is None


def test_a_stop_is_requested_until_the_trainer_reports_that_it_stopped(client: Client, store: Store) -> None:
    client.enter("anna")
    store.put("status", {"state": "training", "step": 3, "text": "Update 4.", "at": "2026-03-04T05:06:07+00:00"})
    store.put("stop", {"by": "anna", "at": "2026-03-04T05:06:09+00:00"})
    page = client.get("/model/status").text
    assert "Stop requested by anna" in page
    assert "Stopped by" not in page
    assert "no heartbeat" not in page
    store.put("heartbeat", "2026-03-04T05:06:11+00:00")
    page = client.get("/model/status").text
    assert_names(page, "no heartbeat", "04 Mar 2026, 05:06 UTC")
    assert "stops within seconds" not in page
    store.put("status", {"state": "stopped", "step": 3, "text": "The loop was stopped.", "at": None})
    page = client.get("/model/status").text
    assert "Stopped by anna" in page
    assert "Stop requested" not in page
    assert "no heartbeat" not in page


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, ("from 1 blind label of version 3<", "1 question waiting<")),
        (2, ("from 2 blind labels of versions 2 to 3<", "2 questions waiting<")),
    ],
)
def test_singular_and_plural(client: Client, store: Store, number: int, expected: tuple[str, str]) -> None:
    store.add([Comparison(prompt=HH.format(f"Question {i}?"), responses=("first", "second")) for i in range(number)])
    store.put("win_rate", {"rate": 0.63, "low": 0.4, "high": 0.8, "answers": number, "first": 4 - number, "last": 3})
    client.enter()
    store.release("me")  # the page has lent them
    page = client.get("/model").text
    assert [text for text in expected if text not in page] == []

"""The typed values that trainer and page exchange: written, read back, and read from what earlier versions stored."""

from datetime import UTC, datetime

import pytest
from store_parts import Clock

from deep_rlhf.feedback.records import AnnotatorFigures
from deep_rlhf.feedback.state import (
    ACTIVE_LOOP,
    AGREEMENT,
    ANNOTATORS,
    FORECAST,
    HEARTBEAT,
    QUESTION_CURSOR,
    SELECTION,
    STATUS,
    STOP,
    WIN_RATE,
    AccuracyForecast,
    ArmFigures,
    Entry,
    PolicyWinRate,
    QuestionCursor,
    SelectionFigures,
    Status,
    StopRequest,
    report_status,
    shown_values,
    stop_requested,
)
from deep_rlhf.feedback.store import Store

MOMENT = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
VALUES = [
    (STATUS, Status(state="training", step=3, text="Update 4.", at=MOMENT)),
    (STOP, StopRequest(by="anna", at=MOMENT)),
    (WIN_RATE, PolicyWinRate(rate=0.5, low=0.25, high=0.75, labels=4, first=1, last=3)),
    (FORECAST, AccuracyForecast(labels=50, accuracy_now=0.5, accuracy_then=0.75, text="Better.")),
    (SELECTION, SelectionFigures(chosen=ArmFigures(labels=1, accuracy=0.5), random=ArmFigures(informative=0.25))),
    (QUESTION_CURSOR, QuestionCursor(draws=1, prompts=3, held_out=4)),
    (AGREEMENT, -0.25),
    (HEARTBEAT, MOMENT),
    (ACTIVE_LOOP, "/runs/1 on host"),
]


@pytest.mark.parametrize(("entry", "value"), VALUES)
def test_a_value_is_read_as_it_was_written_and_can_be_cleared(store: Store, entry: Entry, value: object) -> None:
    assert entry.read(store) is None
    entry.write(store, value)
    assert entry.read(store) == value
    entry.write(store, None)
    assert entry.read(store) is None


def test_the_stored_form_is_that_of_earlier_versions(store: Store) -> None:
    at = "2026-03-04T05:06:07+00:00"
    STATUS.write(store, Status(state="training", step=3, text="Update 4.", at=MOMENT))
    assert store.get("status") == {"state": "training", "step": 3, "text": "Update 4.", "at": at}
    STOP.write(store, StopRequest(by="anna", at=MOMENT))
    assert store.get("stop") == {"by": "anna", "at": at}
    HEARTBEAT.write(store, MOMENT.replace(microsecond=8))
    assert store.get("heartbeat") == at
    WIN_RATE.write(store, PolicyWinRate(rate=0.5, low=0.25, high=0.75, labels=4, first=1, last=3))
    assert store.get("win_rate") == {"rate": 0.5, "low": 0.25, "high": 0.75, "answers": 4, "first": 1, "last": 3}
    SELECTION.write(store, SelectionFigures())
    assert store.get("choosing")["random"] == {"answers": 0, "accuracy": None, "informative": None}
    QUESTION_CURSOR.write(store, QuestionCursor(draws=1, prompts=3, held_out=4))
    assert store.get("questions") == {"draws": 1, "prompts": 3, "held_out": 4}
    assert set(shown_values(store)) == {"status", "stop", "outlook", "alpha", "win_rate", "choosing"}


def test_missing_fields_and_other_types_take_the_default(store: Store) -> None:
    store.put("status", {"state": 3, "text": "Update 4.", "at": "no time", "unknown": 1})
    assert STATUS.read(store) == Status(text="Update 4.")
    store.put("win_rate", {"rate": 1, "low": True, "answers": 2.5})
    assert WIN_RATE.read(store) == PolicyWinRate(rate=1.0)
    store.put("choosing", {"chosen": {"answers": 12, "accuracy": 0.5}, "random": None})
    assert SELECTION.read(store) == SelectionFigures(chosen=ArmFigures(labels=12, accuracy=0.5))
    store.put("status", "text")
    assert STATUS.read(store) is None
    for value in ("no time", "2026-03-04T05:06:07", 5):  # the second has no zone
        store.put("heartbeat", value)
        assert HEARTBEAT.read(store) is None
    for value in (True, "0.5"):
        store.put("alpha", value)
        assert AGREEMENT.read(store) is None


def test_the_status_says_whether_a_loop_runs(store: Store) -> None:
    assert not Status().is_running
    report_status(store, "training", step=2, text="Update 3.")
    status = STATUS.read(store)
    assert status is not None
    assert status.is_running
    assert (status.step, status.text) == (2, "Update 3.")
    assert status.at is not None
    report_status(store, "stopped", step=2, text="All updates are done.")
    assert not (STATUS.read(store) or Status()).is_running


def test_a_stop_is_requested_until_it_is_released(store: Store, clock: Clock) -> None:
    assert not stop_requested(store)
    STOP.write(store, StopRequest(by="anna", at=clock.now))
    assert stop_requested(store)
    assert store.get("stop")["by"] == "anna"
    STOP.write(store, None)
    assert not stop_requested(store)
    assert store.get("stop", "default") is None


def test_the_latest_figures_of_the_annotators_replace_the_earlier(store: Store) -> None:
    figures = AnnotatorFigures(name="anna", labels=3, error_rate=0.1, error_rate_interval=(0.0, 0.3), agreement=0.7)
    ANNOTATORS.write(store, [AnnotatorFigures(name="x", labels=1, error_rate=0.5, error_rate_interval=(0.0, 1.0))])
    ANNOTATORS.write(store, [figures])
    assert store.get("store: annotators")[0]["answers"] == 3
    assert ANNOTATORS.read(store) == [figures]
    assert store.get("alpha", 0.5) == 0.5

"""Questions, who is asked them, and a time that passes when a test says so."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from deep_rlhf.errors import LabelRefused
from deep_rlhf.feedback.records import Comparison
from deep_rlhf.feedback.store import Store

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clock:
    """A time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def pair(prompt: str = "Hi?", **options: Any) -> Comparison:
    return Comparison(prompt=prompt, responses=("yes", "no"), **options)


def pairs(count: int, **options: Any) -> list[Comparison]:
    return [pair(f"prompt {i}", **options) for i in range(count)]


def asked(store: Store, person: str, count: int = 1) -> list[int]:
    return [question.id for question in store.ask(person, count=count)]


def refused(status: str) -> Any:
    return pytest.raises(LabelRefused, check=lambda error: error.status == status)

"""What the second tab shows, gathered from the store: figures and sentences, ready for the templates."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup

from deep_rlhf.feedback.records import Label, Version
from deep_rlhf.feedback.state import (
    AGREEMENT,
    ANNOTATORS,
    FORECAST,
    HEARTBEAT,
    SELECTION,
    STATUS,
    STOP,
    WIN_RATE,
    PolicyWinRate,
    SelectionFigures,
    Status,
)
from deep_rlhf.feedback.store import Store
from deep_rlhf.web.progress.charts import Chart, Line, chart, interval
from deep_rlhf.web.rendering.markdown import short

SHOWN_ALARMS, SHOWN_REWARDS, SHOWN_LABELS, LABELS_OF_A_PAGE = 10, 12, 12, 50
LONGEST_SILENCE = timedelta(minutes=1)  # a trainer gives a sign of life every few seconds
ENOUGH = 10  # answers of each arm, before the page says which taught more
DRAWN = ("step", "reward", "gold", "held_out_reward", "sqrt_kl")  # figures of an update
ICONS = {"warn": "⚠", "stop": "■", "roll_back": "↶"}


class Metrics:
    """The drawn figures of every update. Rows never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self._store, self._last = store, 0
        self._lock = threading.Lock()
        self._rows: list[tuple[float | None, ...]] = []

    def column(self, x: str, y: str) -> list[tuple[float, float]]:
        """(x, y) of the updates that have both."""
        i, j = DRAWN.index(x), DRAWN.index(y)
        return [(a, b) for row in self._rows if (a := row[i]) is not None and (b := row[j]) is not None]

    def refresh(self) -> None:
        """Reads what is new. An update that was done again after a crash replaces what it was before."""
        with self._lock:
            for row in self._store.metrics(after=self._last):
                self._last = row["id"]
                step = _figure(row.get("step"))
                if step is None:
                    continue
                while self._rows and (self._rows[-1][0] or 0) >= step:
                    self._rows.pop()
                self._rows.append(tuple(_figure(row.get(name)) for name in DRAWN))


@dataclass(frozen=True, slots=True)
class Use:
    """Which answers a reward model learned first, and from when on the policy followed it."""

    reward: Version
    new_labels: int
    events: tuple[int, int]  # the answers' numbers: after the first, up to the second
    policy: int | None  # the first version that it shaped


def charts_of(metrics: Metrics, policies: Sequence[Version]) -> list[Chart]:
    """Reward and √KL by update, and one against the other."""
    metrics.refresh()
    marks = [float(version.step) for version in policies if version.step > 0][-40:]
    reward = [
        Line("reward", metrics.column("step", "reward")),
        Line("held-out reward", metrics.column("step", "held_out_reward")),
        Line("judge", metrics.column("step", "gold")),
    ]
    against = [
        Line(line, metrics.column("sqrt_kl", name), joined=False)
        for line, name in (("reward", "reward"), ("judge", "gold"))
    ]
    drawn = (
        chart("reward", "Reward", "update", "mean reward", reward, marks),
        chart(
            "kl", "Distance from the start", "update", "√KL", [Line("√KL", metrics.column("step", "sqrt_kl"))], marks
        ),
        chart("frontier", "Reward against distance", "√KL", "mean reward", against),
    )
    return [one for one in drawn if one is not None]


def uses_of(rewards: Sequence[Version], policies: Sequence[Version]) -> list[Use]:
    """One row for each reward model, the newest first."""
    found, before = [], (0, 0)
    for version in rewards:
        policy = next((one.number for one in policies if one.step > version.step), None)
        found.append(Use(version, version.labels - before[0], (before[1], version.last_event), policy))
        before = (version.labels, version.last_event)
    return found[::-1]


def use_of(label: Label, uses: Sequence[Use]) -> Use | None:
    """Where an answer was used first; None if it waits for the next reward model."""
    return next((use for use in uses if use.events[0] < label.event_id <= use.events[1]), None)


def choosing_says(choosing: SelectionFigures | None) -> str:
    """Whether choosing questions pays, in a sentence."""
    chosen, random = (choosing or SelectionFigures()).chosen, (choosing or SelectionFigures()).random
    if min(chosen.answers, random.answers) < ENOUGH or chosen.informative is None or random.informative is None:
        return f"Too few answers to say: it takes {ENOUGH} to chosen and {ENOUGH} to random questions."
    difference = chosen.informative - random.informative
    if abs(difference) < 0.01:
        return "So far chosen questions teach as much as random ones."
    return f"So far chosen questions teach {'more' if difference > 0 else 'less'} than random ones."


def win_rate_bar(win_rate: PolicyWinRate | None) -> Markup | None:
    """The win rate with its interval, as a picture."""
    if win_rate is None or win_rate.rate is None or win_rate.low is None or win_rate.high is None:
        return None
    return interval(win_rate.rate, win_rate.low, win_rate.high)


def now(store: Store) -> dict[str, Any]:
    """How the loop stands: its state and alarms."""
    status = STATUS.read(store) or Status()
    return {
        "status": status,
        "runs": status.is_running,
        "silent_since": silent_since(status, HEARTBEAT.read(store), datetime.now(UTC)),
        "stop": STOP.read(store),
        "alarms": store.alarms()[-SHOWN_ALARMS:][::-1],
        "icons": ICONS,
    }


def silent_since(status: Status, heartbeat: datetime | None, now: datetime) -> datetime | None:
    """When a trainer that should be running gave its last sign of life, if that was too long ago."""
    if not status.is_running or status.state == "pretraining" or heartbeat is None:  # pretraining has no heartbeat
        return None
    last = max(heartbeat, status.at or heartbeat)
    return last if now - last > LONGEST_SILENCE else None


def figures(store: Store, metrics: Metrics) -> dict[str, Any]:
    """The headline figures and curves."""
    rewards = store.versions("reward")
    win_rate = WIN_RATE.read(store)
    return {
        "labels": store.label_count(),
        "waiting": store.waiting(),
        "win_rate": win_rate,
        "win_rate_bar": win_rate_bar(win_rate),
        "outlook": FORECAST.read(store),
        "alpha": AGREEMENT.read(store),
        "charts": charts_of(metrics, store.versions("policy")),
        "reward": rewards[-1] if rewards else None,
    }


def history(store: Store, *, admin: bool, accounts: bool) -> dict[str, Any]:
    """What became of the answers: which question pays, what was used when, and how well people do.

    Whoever labels sees no answer before a reward model learned from it, nor why its question was asked: he could undo
    his own, or read what a colleague said about a question that he will get. Without `accounts` everybody is an
    administrator and labels, so the reasons wait there, too.
    """
    uses = uses_of(store.versions("reward"), store.versions("policy"))
    choosing = SELECTION.read(store)
    return _traced(store, uses, SHOWN_LABELS, admin=admin, accounts=accounts) | {
        "choosing": choosing,
        "choosing_says": choosing_says(choosing),
        "annotators": ANNOTATORS.read(store) or [],
        "uses": uses[:SHOWN_REWARDS],
        "more_uses": max(0, len(uses) - SHOWN_REWARDS),
    }


def answers(store: Store, *, admin: bool, accounts: bool, until: int | None) -> dict[str, Any]:
    """A page of answers up to an event, the newest first, and where each was used first. Who sees which: `history`."""
    uses = uses_of(store.versions("reward"), store.versions("policy"))
    return _traced(store, uses, LABELS_OF_A_PAGE, admin=admin, accounts=accounts, until=until)


def _traced(
    store: Store, uses: Sequence[Use], count: int, *, admin: bool, accounts: bool, until: int | None = None
) -> dict[str, Any]:
    last = store.last_event() if admin else max((use.events[1] for use in uses), default=0)
    newer = until is not None and until < last
    last = until if until is not None and newer else last
    first = max(0, last - 4 * count)  # of the events among which they are looked for
    found = store.labels(after=first, until=last)
    recent = []
    for label in found[-count:][::-1]:
        use = use_of(label, uses)
        recent.append((label, said(label), use, label.comparison.why_selected if accounts or use else None))
    older = found[-count].event_id - 1 if len(found) > count else first
    return {"recent": recent, "reasons": admin, "newer": newer, "older": older}


def said(label: Label) -> str:
    """An answer in words: the beginning of what was preferred."""
    if label.choice in ("a", "b"):
        return short(label.comparison.answers["ab".index(label.choice)], 50)
    return {"tie": "(tie)", "cant_tell": "(can't tell)"}.get(label.choice or "", "(an order)")


def compared(store: Store, first: int | None, second: int | None) -> dict[str, Any]:
    """The fixed prompts as two versions answer them; None for the start, and for the newest."""
    samples = store.samples()
    steps = {version.number: version.step for version in store.versions("policy")}
    known = sorted(samples)
    shown = (first if first in samples else None, second if second in samples else None)
    left, right = shown[0] if shown[0] is not None else (known or [0])[0], shown[1]
    right = right if right is not None else (known or [0])[-1]
    answers = {number: dict(samples.get(number, [])) for number in (left, right)}
    prompts = list(dict.fromkeys(prompt for number in (left, right) for prompt, _ in samples.get(number, [])))
    return {
        "known": [(number, steps.get(number)) for number in known],
        "left": left,
        "right": right,
        "follows": shown[1] is None,
        "rows": [(prompt, answers[left].get(prompt), answers[right].get(prompt)) for prompt in prompts],
    }


def _figure(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

"""What the model tab shows, read from the store: figures, charts and sentences for the templates."""

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

MAX_ALARMS, MAX_REWARD_VERSIONS, MAX_LABELS, LABELS_PER_PAGE = 10, 12, 12, 50
HEARTBEAT_TIMEOUT = timedelta(minutes=1)  # the trainer writes a heartbeat every few seconds
MIN_LABELS = 10  # per arm, before the page compares them
PLOTTED = ("step", "reward", "gold", "held_out_reward", "sqrt_kl")  # metrics of an update
ICONS = {"warn": "⚠", "stop": "■", "roll_back": "↶"}


class Metrics:
    """The plotted metrics of every update. Rows never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self._store, self._last = store, 0
        self._lock = threading.Lock()
        self._rows: list[tuple[float | None, ...]] = []

    def column(self, x: str, y: str) -> list[tuple[float, float]]:
        """The points (x, y) of the updates that have both metrics."""
        i, j = PLOTTED.index(x), PLOTTED.index(y)
        return [(a, b) for row in self._rows if (a := row[i]) is not None and (b := row[j]) is not None]

    def refresh(self) -> None:
        """Reads new rows. An update repeated after a crash replaces its earlier row and those after it."""
        with self._lock:
            for row in self._store.metrics(after=self._last):
                self._last = row["id"]
                step = _figure(row.get("step"))
                if step is None:
                    continue
                while self._rows and (self._rows[-1][0] or 0) >= step:
                    self._rows.pop()
                self._rows.append(tuple(_figure(row.get(name)) for name in PLOTTED))


@dataclass(frozen=True, slots=True)
class LabelUse:
    """The labels that a reward model was the first to use, and the first policy version trained with it."""

    reward: Version
    new_labels: int
    events: tuple[int, int]  # event ids of the labels: after the first, up to the second
    policy: int | None


def training_charts(metrics: Metrics, policies: Sequence[Version]) -> list[Chart]:
    """Charts of reward and √KL by update, and of one against the other."""
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


def label_uses(rewards: Sequence[Version], policies: Sequence[Version]) -> list[LabelUse]:
    """The labels that each reward model was the first to use, newest first."""
    found, before = [], (0, 0)
    for version in rewards:
        policy = next((one.number for one in policies if one.step > version.step), None)
        found.append(LabelUse(version, version.labels - before[0], (before[1], version.last_event), policy))
        before = (version.labels, version.last_event)
    return found[::-1]


def first_use(label: Label, uses: Sequence[LabelUse]) -> LabelUse | None:
    """The first use of a label; None if it waits for the next reward model."""
    return next((use for use in uses if use.events[0] < label.event_id <= use.events[1]), None)


def selection_summary(selection: SelectionFigures | None) -> str:
    """Compares active with random selection of questions, in one sentence."""
    selection = selection or SelectionFigures()
    chosen, random = selection.chosen, selection.random
    if min(chosen.labels, random.labels) < MIN_LABELS or chosen.informative is None or random.informative is None:
        return f"Too few labels to compare: each kind of question needs at least {MIN_LABELS}."
    difference = chosen.informative - random.informative
    if abs(difference) < 0.01:
        return "So far, selected questions are as informative as random ones."
    return f"So far, selected questions are {'more' if difference > 0 else 'less'} informative than random ones."


def win_rate_bar(win_rate: PolicyWinRate | None) -> Markup | None:
    """Draws the win rate with its interval; None if there is none."""
    if win_rate is None or win_rate.rate is None or win_rate.low is None or win_rate.high is None:
        return None
    return interval(win_rate.rate, win_rate.low, win_rate.high)


def loop_status(store: Store) -> dict[str, Any]:
    """The state of the training loop, and its newest alarms."""
    status = STATUS.read(store) or Status()
    return {
        "status": status,
        "runs": status.is_running,
        "silent_since": silent_since(status, HEARTBEAT.read(store), datetime.now(UTC)),
        "stop": STOP.read(store),
        "alarms": store.alarms()[-MAX_ALARMS:][::-1],
        "icons": ICONS,
    }


def silent_since(status: Status, heartbeat: datetime | None, now: datetime) -> datetime | None:
    """The last heartbeat of a trainer that should be running, if it is older than a minute; else None."""
    if not status.is_running or status.state == "pretraining" or heartbeat is None:  # pretraining has no heartbeat
        return None
    last = max(heartbeat, status.at or heartbeat)
    return last if now - last > HEARTBEAT_TIMEOUT else None


def key_figures(store: Store, metrics: Metrics) -> dict[str, Any]:
    """The headline figures and charts."""
    rewards = store.versions("reward")
    win_rate = WIN_RATE.read(store)
    return {
        "labels": store.label_count(),
        "waiting": store.waiting(),
        "win_rate": win_rate,
        "win_rate_bar": win_rate_bar(win_rate),
        "forecast": FORECAST.read(store),
        "agreement": AGREEMENT.read(store),
        "charts": training_charts(metrics, store.versions("policy")),
        "reward": rewards[-1] if rewards else None,
    }


def label_history(store: Store, *, admin: bool, accounts: bool) -> dict[str, Any]:
    """How the labels were used: active against random selection, first uses, and the annotators' reliability.

    Annotators see a label, and why its question was asked, only once a reward model has used it: otherwise they could
    undo their own label, or read another person's label of a question that they will get. Without `accounts` everybody
    is an administrator who labels, so the reasons are hidden until then, too.
    """
    uses = label_uses(store.versions("reward"), store.versions("policy"))
    selection = SELECTION.read(store)
    return _recent_labels(store, uses, MAX_LABELS, admin=admin, accounts=accounts) | {
        "selection": selection,
        "selection_summary": selection_summary(selection),
        "annotators": ANNOTATORS.read(store) or [],
        "uses": uses[:MAX_REWARD_VERSIONS],
        "more_uses": max(0, len(uses) - MAX_REWARD_VERSIONS),
    }


def labels_page(store: Store, *, admin: bool, accounts: bool, until: int | None) -> dict[str, Any]:
    """A page of labels up to an event, newest first, each with its first use. `label_history` says who sees which."""
    uses = label_uses(store.versions("reward"), store.versions("policy"))
    return _recent_labels(store, uses, LABELS_PER_PAGE, admin=admin, accounts=accounts, until=until)


def _recent_labels(
    store: Store, uses: Sequence[LabelUse], count: int, *, admin: bool, accounts: bool, until: int | None = None
) -> dict[str, Any]:
    last = store.last_event() if admin else max((use.events[1] for use in uses), default=0)
    newer = until is not None and until < last
    last = until if until is not None and newer else last
    first = max(0, last - 4 * count)  # not every event is a label
    found = store.labels(after=first, until=last)
    recent = []
    for label in found[-count:][::-1]:
        use = first_use(label, uses)
        recent.append((label, label_summary(label), use, label.comparison.why_selected if accounts or use else None))
    older = found[-count].event_id - 1 if len(found) > count else first
    return {"recent": recent, "reasons": admin, "newer": newer, "older": older}


def label_summary(label: Label) -> str:
    """A label in words: the beginning of the preferred response."""
    if label.choice in ("a", "b"):
        return short(label.comparison.responses["ab".index(label.choice)], 50)
    return {"tie": "(tie)", "cant_tell": "(can't tell)"}.get(label.choice or "", "(a ranking)")


def compare_versions(store: Store, first: int | None, second: int | None) -> dict[str, Any]:
    """The responses of two policy versions to the fixed prompts; by default the first version and the newest."""
    samples = store.samples()
    steps = {version.number: version.step for version in store.versions("policy")}
    known = sorted(samples)
    shown = (first if first in samples else None, second if second in samples else None)
    left, right = shown[0] if shown[0] is not None else (known or [0])[0], shown[1]
    right = right if right is not None else (known or [0])[-1]
    responses = {number: dict(samples.get(number, [])) for number in (left, right)}
    prompts = list(dict.fromkeys(prompt for number in (left, right) for prompt, _ in samples.get(number, [])))
    return {
        "known": [(number, steps.get(number)) for number in known],
        "left": left,
        "right": right,
        "follows": shown[1] is None,
        "rows": [(prompt, responses[left].get(prompt), responses[right].get(prompt)) for prompt in prompts],
    }


def _figure(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # JSON may hold whole numbers of any size
        return None

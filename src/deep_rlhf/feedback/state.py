"""What the trainer, the page and the commands tell each other through a store: one typed value per key.

Each constant below is an entry of the store's key/value table. The stored form is JSON; a field that is missing there,
or has another type, takes its default, so that stores written by earlier versions stay readable.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar, get_args, get_type_hints

from deep_rlhf.feedback.records import AnnotatorFigures
from deep_rlhf.feedback.store import Store

T = TypeVar("T")
MOST = 2**62  # of a stored number: larger ones were not written by this program
COUNTS = ("gold_right", "gold_asked", "repeats_same", "repeats_asked")  # of AnnotatorFigures
ANSWERS = "answers"  # how counts of labels are called in stored values

LoopState = Literal["pretraining", "starting", "waiting for labels", "refitting", "training", "stopped"]


def _labels() -> Any:
    return field(default=0, metadata={"key": ANSWERS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the training loop is doing, for the page and the terminal."""

    state: str = ""  # a LoopState; "" before the first loop
    step: int = 0  # updates of the policy that are done
    text: str = ""  # one sentence
    at: datetime | None = None

    @property
    def is_running(self) -> bool:
        """Whether a loop has started and has not reported its end."""
        return self.state not in ("", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequest:
    """The stop button was pressed."""

    by: str = "somebody"
    at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyWinRate:
    """How often the newer of two policies won the blind pairs, with the 95% interval."""

    rate: float | None = None
    low: float | None = None
    high: float | None = None
    labels: int = _labels()  # of blind pairs that were counted
    first: int = 0  # oldest and …
    last: int = 0  # … newest policy version among them


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyForecast:
    """The reward model's accuracy on new labels, now and after `next` more."""

    labels: int = 0
    next: int = 100
    accuracy_now: float | None = None
    accuracy_then: float | None = None
    text: str = ""  # the same in one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """The labels of one selection arm: of selected or of random questions."""

    labels: int = _labels()
    accuracy: float | None = None  # share that the reward model predicted when the question was asked
    informative: float | None = None  # mean bits by which a label is less surprising to the newest reward model


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionFigures:
    """Active against random selection of questions."""

    chosen: ArmFigures = ArmFigures()
    random: ArmFigures = ArmFigures()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionCursor:
    """How far the generator of questions has come, so that a restarted loop asks nothing twice."""

    draws: int = 0  # seeds used
    prompts: int = 0  # position in the training prompts
    held_out: int = 0  # position in the held-out prompts


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One key of a store, and how its value is written as JSON and read back."""

    key: str
    encode: Callable[[T], Any]
    decode: Callable[[Any], T | None]

    def read(self, store: Store) -> T | None:
        """The value; None if it was never written, was cleared, or has another form."""
        value = store.get(self.key)
        return None if value is None else self.decode(value)

    def write(self, store: Store, value: T | None) -> None:
        """Replaces the value; None clears it."""
        store.put(self.key, None if value is None else self.encode(value))


def _entry(key: str, kind: type[T]) -> Entry[T]:
    return Entry(key, _to_json, lambda value: _from_json(kind, value))


def _to_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if is_dataclass(value) and not isinstance(value, type):
        return {_key(one): _to_json(getattr(value, one.name)) for one in fields(value)}
    return [_to_json(item) for item in value] if isinstance(value, list | tuple) else value


def _from_json(kind: Any, value: Any) -> Any:
    """The value as a `kind`, None where it is something else."""
    kind = next((part for part in get_args(kind) if part is not type(None)), kind)  # X | None
    if is_dataclass(kind):
        if not isinstance(value, dict):
            return None
        hints = get_type_hints(kind)
        found = {one.name: _from_json(hints[one.name], value.get(_key(one))) for one in fields(kind)}
        return kind(**{name: item for name, item in found.items() if item is not None})  # type: ignore[operator]
    if kind is datetime:
        return _moment(value)
    if kind is float:
        return float(value) if _is_number(value) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


def _key(one: "Field[Any]") -> str:
    return str(one.metadata.get("key", one.name))


def _moment(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else None


def _annotators_to_json(people: list[AnnotatorFigures]) -> list[dict[str, Any]]:
    found = [_to_json(person) for person in people]
    return [{ANSWERS if name == "labels" else name: value for name, value in one.items()} for one in found]


def _annotators_from_json(value: Any) -> list[AnnotatorFigures]:
    found = [_annotator_from_json(one) for one in value] if isinstance(value, list) else []
    return [one for one in found if one is not None]


def _annotator_from_json(value: Any) -> AnnotatorFigures | None:
    """One person's figures, None where a part is missing or has another type."""
    if not isinstance(value, dict):
        return None
    name, labels = _from_json(str, value.get("name")), _from_json(int, value.get(ANSWERS))
    error_rate, interval = _from_json(float, value.get("error_rate")), value.get("error_rate_interval")
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))):
        return None
    if None in (name, labels, error_rate):
        return None
    return AnnotatorFigures(
        name=name,
        labels=labels,
        error_rate=error_rate,
        error_rate_interval=tuple(interval),
        agreement=_from_json(float, value.get("agreement")),
        **{count: _from_json(int, value.get(count)) or 0 for count in COUNTS},
    )


# Written by the page, read by the trainer.
STOP = _entry("stop", StopRequest)
# Written by the trainer, read by the page.
STATUS = _entry("status", Status)
HEARTBEAT = _entry("heartbeat", datetime)  # written every few seconds while a loop runs
WIN_RATE = _entry("win_rate", PolicyWinRate)
FORECAST = _entry("outlook", AccuracyForecast)
SELECTION = _entry("choosing", SelectionFigures)
AGREEMENT = _entry("alpha", float)  # Krippendorff's α
ANNOTATORS = Entry("store: annotators", _annotators_to_json, _annotators_from_json)
# Written and read by the trainer.
ACTIVE_LOOP = _entry("loop", str)  # run folder and host of the loop that works on this store
START_POLICY = _entry("start policy", str)  # fingerprint of the weights that the first loop began with
NEWEST_RUN = _entry("run", str)  # the run that wrote the newest metrics and alarms
QUESTION_CURSOR = _entry("questions", QuestionCursor)
# Written and read by the page.
STORE_ID = _entry("store_id", str)  # distinguishes stores whose questions have the same numbers

SHOWN: tuple[Entry[Any], ...] = (STATUS, STOP, FORECAST, AGREEMENT, WIN_RATE, SELECTION)  # on the page's second tab


def report_status(store: Store, state: LoopState, *, step: int, text: str) -> None:
    """Writes what the loop is doing now."""
    STATUS.write(store, Status(state=state, step=step, text=text, at=datetime.now(UTC)))


def stop_requested(store: Store) -> bool:
    """Whether somebody pressed the stop button since it was released."""
    return STOP.read(store) is not None


def shown_values(store: Store) -> dict[str, Any]:
    """The stored JSON values of the entries on the second tab, by key: whoever compares two sees what changed."""
    return {entry.key: store.get(entry.key) for entry in SHOWN}

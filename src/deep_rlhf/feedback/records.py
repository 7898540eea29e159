"""The records that trainer, store and page exchange: questions, labels, versions, alarms."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from deep_rlhf.errors import DataError

Choice = Literal["a", "b", "tie", "cant_tell"]
AcquisitionRule = Literal["random", "variance", "information"]  # how questions for training are selected
ACQUISITION_RULES: tuple[AcquisitionRule, ...] = get_args(AcquisitionRule)
# Why a question is asked. "random" is also the permanent control arm; the last three measure people or the policy.
Reason = Literal["initial", "random", "variance", "information", "gold", "repeat", "win_rate"]
FOR_LABEL: tuple[Reason, ...] = ("initial", "random", "variance", "information")
MU: dict[Choice, float | None] = {"a": 1.0, "b": 0.0, "tie": 0.5, "cant_tell": None}  # Christiano et al. 2017, §2.2.2
CHOICES: dict[float | None, Choice] = {mu: choice for choice, mu in MU.items()}
MOST_RESPONSES = 9  # in a ranking: one key of the keyboard each
STRENGTHS = (1, 2, 3, 4)  # slightly, clearly, much, far better


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A question: which of these responses to one prompt is better?

    Two responses, a and b, are compared; three to nine are ranked. Raises DataError for any other number, and unless
    exactly the gold questions have an expected choice.
    """

    prompt: str  # as the policy reads it, with its template applied
    responses: tuple[str, ...]
    why_selected: Reason = "random"
    policy_version: int = 0  # of the policy that wrote the responses
    reward_version: int = 0  # of the reward model that selected the question
    writers: tuple[int, ...] = ()  # policy version of each response, where they differ (win_rate)
    predicted: float | None = None  # P(a is better) by the reward model when the question was asked
    priority: float = 0.0  # larger values are asked first
    overlap: int = 1  # number of different people who shall label it
    expected: Choice | None = None  # of a gold question
    repeat_of: int | None = None  # id of the comparison that this one repeats

    def __post_init__(self) -> None:
        if not 2 <= len(self.responses) <= MOST_RESPONSES:
            raise DataError(f"A comparison must have 2 to {MOST_RESPONSES} responses, not {len(self.responses)}.")
        if (self.why_selected == "gold") != (self.expected is not None):
            raise DataError(
                "A gold question must have an expected choice, and no other question may have one; this one has"
                f" why_selected={self.why_selected} and expected={self.expected}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A comparison that is leased to one person."""

    id: int  # of the comparison
    comparison: Comparison
    shown_order: tuple[int, ...]  # shown_order[0] is the index of the response on the left, or on top
    leased_until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A person's judgement of a comparison that was not undone. Never changed, never deleted."""

    event_id: int  # increases with time: what a refit has learned from is everything up to one event
    comparison_id: int
    comparison: Comparison
    annotator: str
    choice: Choice | None  # of a pair
    ranks: tuple[int, ...] | None  # of a ranking: one per response, 1 is the best, equal numbers are ties
    strength: int | None
    shown_order: tuple[int, ...]
    seconds: float
    created: datetime
    imported: bool = False  # from a file: used for training, but not about this store's policies


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A snapshot of the policy or of the reward model."""

    kind: Literal["policy", "reward"]
    number: int  # 0 is the start
    step: int  # updates of the policy before it was made
    labels: int  # that it has learned from
    last_event: int  # id of the newest label event that it has learned from
    figures: dict[str, float] = field(default_factory=dict)
    created: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A measured value out of its limit, and what was done about it."""

    name: str  # one of monitoring.alarms.NAMES
    step: int
    action: Literal["warn", "stop", "roll_back"]
    message: str  # one sentence with the value and its limit
    figure: float
    limit: float
    created: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorFigures:
    """An annotator's reliability: fitted by annotators.reliability, shown on the page."""

    name: str
    labels: int
    error_rate: float  # share of labels that are as good as random
    error_rate_interval: tuple[float, float]
    gold_right: int = 0
    gold_asked: int = 0
    repeats_same: int = 0
    repeats_asked: int = 0
    agreement: float | None = None  # share of labels equal to another person's label of the same question


Row = dict[str, Any]

"""What people are asked and what they answer: the records between the trainer, the store and the page."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from deep_rlhf.errors import UserError

Choice = Literal["a", "b", "tie", "cant_tell"]
# Why a question is asked. The last three measure people or the policy; "random" is also the permanent random arm.
AcquisitionRule = Literal["random", "variance", "information"]  # how questions are selected
ACQUISITION_RULES: tuple[AcquisitionRule, ...] = get_args(AcquisitionRule)
Reason = Literal["initial", "random", "variance", "information", "gold", "repeat", "win_rate"]
FOR_LABEL: tuple[Reason, ...] = ("initial", "random", "variance", "information")
MU: dict[Choice, float | None] = {"a": 1.0, "b": 0.0, "tie": 0.5, "cant_tell": None}  # Christiano et al. 2017, §2.2.2
CHOICES: dict[float | None, Choice] = {mu: choice for choice, mu in MU.items()}
MOST_ANSWERS = 9  # of a ranking: one key each
STRENGTHS = (1, 2, 3, 4)  # slightly, clearly, much, far better


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A question: which of these answers to one prompt is better?

    Two answers, a and b, make a pair; three to nine are ranked. Raises UserError for other numbers, and for a gold
    question without an expected choice.
    """

    prompt: str  # as the policy reads it; a dialogue is in the form of its template
    answers: tuple[str, ...]
    why_selected: Reason = "random"
    policy_version: int = 0  # of the policy that wrote the answers
    reward_version: int = 0  # of the reward model that chose the question
    writers: tuple[int, ...] = ()  # policy version of each answer, where they differ (win_rate)
    predicted: float | None = None  # P(a is better) by the reward model when it was asked
    priority: float = 0.0  # the larger, the earlier it is asked
    overlap: int = 1  # different people who shall answer it
    expected: Choice | None = None  # of a gold question
    repeat_of: int | None = None  # id of the comparison that this one repeats

    def __post_init__(self) -> None:
        if not 2 <= len(self.answers) <= MOST_ANSWERS:
            raise UserError(f"A comparison has 2 to {MOST_ANSWERS} answers, not {len(self.answers)}.")
        if (self.why_selected == "gold") != (self.expected is not None):
            raise UserError("A gold question has an expected choice, and no other question has one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A comparison as it is put to one person, who holds a lease on it."""

    id: int  # of the comparison
    comparison: Comparison
    shown_order: tuple[int, ...]  # shown_order[0] is the index of the answer on the left, or on top
    leased_until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """An answer that counts: given, and not undone since. Never changed, never deleted."""

    event_id: int  # grows with time: what a refit has seen is everything up to one
    comparison_id: int
    comparison: Comparison
    annotator: str
    choice: Choice | None  # of a pair
    ranks: tuple[int, ...] | None  # of a ranking: 1 is the best, equal numbers are ties, one number per answer
    strength: int | None
    shown_order: tuple[int, ...]
    seconds: float
    created: datetime
    imported: bool = False  # from a file: to learn from, but no answer about this store's policies


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One state of the policy or of the reward model."""

    kind: Literal["policy", "reward"]
    number: int  # 0 is the start
    step: int  # updates of the policy that were done
    labels: int  # that it has learned from
    last_event: int  # id of the newest label event that it has learned from
    figures: dict[str, float] = field(default_factory=dict)
    created: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that a person should look at, and what was done about it."""

    name: str  # one of feedback.alarms.NAMES
    step: int
    action: Literal["warn", "stop", "roll_back"]
    message: str  # one sentence with the figure and its limit
    figure: float
    limit: float
    created: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatorFigures:
    """How an annotator does: fitted by feedback.reliability, shown on the page."""

    name: str
    answers: int
    error_rate: float  # share of answers that are as good as random
    error_rate_interval: tuple[float, float]
    gold_right: int = 0
    gold_asked: int = 0
    repeats_same: int = 0
    repeats_asked: int = 0
    agreement: float | None = None  # share of answers equal to another person's on the same question


Row = dict[str, Any]

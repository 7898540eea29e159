"""One answer as rows of a file of preferences, and back.

A row has the columns that `reward_modeling.py` reads, and everything else that is known of the answer. A pair is one
row; a ranking of K is one row for each two of its answers, each of weight 2/K: together they count as K − 1 pairs, for
that many comparisons of neighbours say all that the ranking says. (Ouyang et al. 2022, section 3.5, train on all pairs
of a ranking too; each of their rankings counts as one.)
"""

import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Any, cast, get_args

from deep_rlhf.data.chat import Template
from deep_rlhf.data.layouts import VOTES, Layout, text_of, to_preference
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import SourceRow
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.records import CHOICES, Choice, Comparison, Label, Reason
from deep_rlhf.feedback.reward_refit.preferences import label_preferences, text_id
from deep_rlhf.feedback.store import PortableLabel
from deep_rlhf.types import Preference

MARKS = ("prompt", "a", "b", "mu", "question", "token")  # a file with all these columns is an export
NOBODY = "import"  # whose answer it is where the file does not say


def rows_of(answer: PortableLabel) -> list[dict[str, Any]]:
    """The rows of an answer. One that says nothing has a row without `mu`."""
    label = answer.label
    comparison = label.comparison
    is_pair = len(comparison.answers) == 2
    shared = {
        "strength": label.strength,
        "seconds": label.seconds,
        "shown_order": list(label.shown_order),
        "answers": None if is_pair else [_clean(text) for text in comparison.answers],
        "ranks": None if label.ranks is None else list(label.ranks),
        "why_selected": comparison.why_selected,
        "expected": comparison.expected,
        "policy_version": comparison.policy_version,
        "reward_version": comparison.reward_version,
        "writers": list(comparison.writers),
        "predicted": comparison.predicted,
        "created": label.created.astimezone(UTC).isoformat(),
        "question": answer.question,
        "repeats": answer.repeats,
        "token": answer.token,
    }
    first, second = comparison.answers[:2]
    nothing = Preference(prompt=comparison.prompt, a=first, b=second, annotator=label.annotator)
    return [
        {
            "prompt": _clean(pair.prompt),
            "a": _clean(pair.a),
            "b": _clean(pair.b),
            "mu": None if pair is nothing else pair.mu,
            "weight": pair.weight,
            "id": pair.id or text_id(comparison.prompt, comparison.answers),
            "annotator": pair.annotator,
            **shared,
        }
        for pair in label_preferences(label) or [nothing]
    ]


def answer_of(row: SourceRow) -> PortableLabel:
    """The answer of a row that `rows_of` made; the rows of a ranking have the same. Raises BadRow."""
    values = row.values
    ranks = _integers(values, "ranks")
    texts = values.get("answers")
    if texts is None:
        texts = [text_of(values, "a"), text_of(values, "b")]
    elif not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("wrong type", "column 'answers' must be a list of texts")
    try:
        comparison = Comparison(
            prompt=text_of(values, "prompt"),
            answers=tuple(texts),
            why_selected=cast(Reason, _one_of(values, "why_selected", get_args(Reason), "random")),
            policy_version=_integer(values, "policy_version") or 0,
            reward_version=_integer(values, "reward_version") or 0,
            writers=_integers(values, "writers") or (),
            predicted=_number(values, "predicted"),
            expected=cast(Choice | None, _one_of(values, "expected", get_args(Choice), None)),
        )
    except UserError as error:
        raise BadRow("wrong value", str(error)) from None
    label = Label(
        event_id=0,
        comparison_id=0,
        comparison=comparison,
        annotator=_text(values, "annotator") or NOBODY,
        choice=_choice(_number(values, "mu")) if ranks is None else None,
        ranks=ranks,
        strength=_integer(values, "strength"),
        shown_order=_integers(values, "shown_order") or tuple(range(len(texts))),
        seconds=_number(values, "seconds") or 0.0,
        created=_moment(values, "created"),
    )
    repeats = _text(values, "repeats") or None
    return PortableLabel(
        label=label, token=text_of(values, "token"), question=text_of(values, "question"), repeats=repeats
    )


class ForeignRows:
    """Answers of a file that is no export: any format of preferences.

    Nothing in such a file says which answer is which, so its texts, the annotator and how often he judged them do: the
    same file read twice gives the same answers.
    """

    def __init__(self, form: Layout, template: Template, source: str, now: datetime) -> None:
        self._form, self._template, self._source, self._now = form, template, source, now
        self._times: dict[tuple[str, str], int] = {}

    def answers_of(self, row: SourceRow) -> list[PortableLabel] | str:
        """The answers of a row, one for each vote, or the reason to drop it; raises BadRow if it is malformed."""
        pair = to_preference(row, self._form, self._template, self._source)
        if isinstance(pair, str):
            return pair
        name = pair.annotator or NOBODY
        if self._form.judgement == "votes":
            return [self._answer(pair, *_vote(vote, f"{name} {i}")) for i, vote in enumerate(row.values["votes"], 1)]
        if pair.mu not in CHOICES:
            expected = "one person's answer, 1, 0 or 0.5; for the answers of several give a column 'votes'"
            raise BadRow("not one answer", f"column 'mu' must be {expected}, but is {pair.mu}")
        return [self._answer(pair, name, CHOICES[pair.mu])]

    def _answer(self, pair: Preference, annotator: str, choice: Choice) -> PortableLabel:
        content = text_id(pair.prompt, (pair.a, pair.b))
        times = self._times[content, annotator] = self._times.get((content, annotator), 0) + 1
        token = hashlib.sha256(json.dumps([content, annotator, times]).encode()).hexdigest()[:32]
        label = Label(
            event_id=0,
            comparison_id=0,
            comparison=Comparison(prompt=pair.prompt, answers=(pair.a, pair.b)),
            annotator=annotator,
            choice=choice,
            ranks=None,
            strength=None,
            shown_order=(0, 1),
            seconds=0.0,
            created=self._now,
        )
        return PortableLabel(label=label, token=f"import {token}", question=f"import {content} {times}")


def _vote(vote: Any, voter: str) -> tuple[str, Choice]:
    """Who voted, and how: `to_preference` has checked it."""
    who, said = (str(vote[0]), vote[1]) if isinstance(vote, list) else (voter, vote)
    return who, CHOICES[VOTES[said]]


def _clean(text: str) -> str:
    """Half a surrogate pair, which no file in UTF-8 can hold, becomes a question mark."""
    return text.encode(errors="replace").decode()


def _choice(mu: float | None) -> Choice:
    if mu not in CHOICES:
        raise BadRow("wrong value", f"column 'mu' must be 1, 0, 0.5 or null (can't tell), but is {mu}")
    return CHOICES[mu]


def _one_of(values: dict[str, Any], column: str, known: tuple[str, ...], default: str | None) -> str | None:
    value = values.get(column) or default
    if value is not None and value not in known:
        raise BadRow("wrong value", f"column '{column}' must be one of {', '.join(known)}, but is {value!r}")
    return value


def _text(values: dict[str, Any], column: str) -> str:
    return "" if values.get(column) is None else text_of(values, column)


def _integer(values: dict[str, Any], column: str) -> int | None:
    value = values.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise BadRow("wrong type", f"column '{column}' must be a whole number, but is {value!r}")
    return value


def _integers(values: dict[str, Any], column: str) -> tuple[int, ...] | None:
    value = values.get(column)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise BadRow("wrong type", f"column '{column}' must be a list of whole numbers, but is {value!r}")
    return tuple(value)


def _number(values: dict[str, Any], column: str) -> float | None:
    value = values.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow("wrong type", f"column '{column}' must be a number, but is {value!r}")
    return float(value)


def _moment(values: dict[str, Any], column: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text_of(values, column))
    except ValueError:
        raise BadRow("wrong type", f"column '{column}' must be a time, but is {values[column]!r}") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

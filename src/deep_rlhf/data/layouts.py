"""One row becomes one comparison: which columns a data set has decides how, once for all its rows.

Accepted are hh-rlhf text (`chosen` and `rejected` are whole dialogues with a shared beginning), explicit
prompt/chosen/rejected, messages of {role, content} with or without an explicit prompt, and pairs with a probability,
votes or a label instead of a fixed winner.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from deep_rlhf.data.chat import HH, ROLES, Template, render_messages, render_turns
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import Row, closest_first
from deep_rlhf.errors import UserError
from deep_rlhf.types import Preference

PAIRS = (("chosen", "rejected"), ("a", "b"), ("a1", "a2"))
VOTES = {"a": 1.0, "a1": 1.0, "b": 0.0, "a2": 0.0, "equal": 0.5, "tie": 0.5}  # vote -> probability that a is better
JUDGEMENTS = ("mu", "votes", "label")
ACCEPTED = (
    "accepted are chosen + rejected (hh-rlhf dialogues, or messages), prompt + chosen + rejected, "
    "and prompt + a + b with mu, votes or label"
)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Format:
    """Which columns hold the two answers, and in which form everything is."""

    a: str
    b: str
    prompt: bool  # there is a column `prompt`
    messages: bool  # the answers are lists of messages, not text
    prompt_messages: bool
    judgement: str  # column that says which is better; "" if `a` always is


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return every column that some row has, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row.values))


def holds_lists(rows: Sequence[Row], column: str) -> bool:
    """Tell whether a column holds lists and not text, by its first value that is there."""
    return isinstance(next((row.values[column] for row in rows if row.values.get(column) is not None), None), list)


def detect_format(rows: Sequence[Row], name: str) -> Format:
    """Return the format of a data set's rows; raises UserError, with the columns there are and what is accepted."""
    columns = columns_of(rows)
    pair = next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
    have = f"its columns are {closest_first('chosen rejected prompt', columns)}"
    if pair is None:
        raise UserError(f"{name} holds no preferences that are understood: {have}; {ACCEPTED}")
    a, b = pair
    messages, prompt = holds_lists(rows, a), "prompt" in columns
    if not prompt and not messages and not any(HH.assistant in str(row.values.get(a)) for row in rows):
        markers = f"{HH.human!r} and {HH.assistant!r}"
        raise UserError(
            f"{name} has no column 'prompt' and its '{a}' is no dialogue with {markers}; {have}; {ACCEPTED}"
        )
    judgement = next((column for column in JUDGEMENTS if column in columns), "")
    if a == "chosen":
        # Here the winner is known, so a column of that name may be about something else.
        votes = judgement != "votes" or holds_lists(rows, "votes")
        labels = judgement != "label" or any(row.values.get("label") in tuple(VOTES) for row in rows)
        judgement = judgement if votes and labels else ""
    elif not judgement:
        raise UserError(
            f"{name} has '{a}' and '{b}' but no mu, votes or label to say which is better; {have}; {ACCEPTED}"
        )
    return Format(a, b, prompt, messages, prompt and holds_lists(rows, "prompt"), judgement)


def to_preference(row: Row, form: Format, template: Template, source: str) -> Preference | str:
    """Return a row's comparison, or the reason to drop it; raises BadRow if it is malformed."""
    values = row.values
    mu = _mu(values, form.judgement)
    texts = pair_texts(row, form, template)
    if texts is None:
        return "no shared prompt"
    prompt, a, b = texts
    if not a.strip() or not b.strip():
        return "empty answer"
    if a.strip() == b.strip():
        return "chosen equals rejected"
    weight = _number(values, "weight", 1.0)
    if weight < 0:
        raise BadRow("wrong type", f"column 'weight' must not be negative, but is {weight}")
    return Preference(
        prompt=prompt,
        a=a,
        b=b,
        mu=mu,
        weight=weight,
        margin=_number(values, "margin", 0.0),
        id=_label(values, "id") or hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
        source=source,
        annotator=_label(values, "annotator"),
        subset=_label(values, "subset") or row.subset,
    )


def pair_texts(row: Row, form: Format, template: Template) -> tuple[str, str, str] | None:
    """Return (prompt, a, b) as text, None if the two dialogues share no prompt; raises BadRow if the row is malformed.

    hh text is split at the last assistant's marker of the part that both dialogues share, so `prompt + a` is the
    dialogue as it was; where two dialogues differ earlier than in their last turn, the answers hold the further turns.
    Messages have turns, so they become hh text under every template.
    """
    if form.messages:
        return _message_texts(row, form)
    a, b = text_of(row.values, form.a), text_of(row.values, form.b)
    if form.prompt_messages:
        return render_messages(messages_of(row.values, "prompt")), HH.answer(a), HH.answer(b)
    if form.prompt:
        return template.prompt(text_of(row.values, "prompt")), template.answer(a), template.answer(b)
    cut = os.path.commonprefix([a, b]).rfind(HH.assistant)  # noqa: RUF071 (text is meant, not paths)
    if cut < 0:
        return None
    cut += len(HH.assistant)
    return a[:cut], a[cut:], b[cut:]


def _message_texts(row: Row, form: Format) -> tuple[str, str, str] | None:
    a, b = messages_of(row.values, form.a), messages_of(row.values, form.b)
    if form.prompt_messages:
        prompt = messages_of(row.values, "prompt")
    else:
        shared = _shared_turns(a, b)
        prompt, a, b = a[:shared], a[shared:], b[shared:]
        if not prompt and form.prompt:
            prompt = [{"role": "user", "content": text_of(row.values, "prompt")}]
    if not prompt:
        return None
    for column, answer in ((form.a, a), (form.b, b)):
        if answer[0]["role"] != "assistant":
            raise BadRow(
                "wrong type", f"column '{column}' must go on with the assistant, but does with {answer[0]['role']}"
            )
    answers = [HH.answer(answer[0]["content"]) + render_turns(answer[1:]) for answer in (a, b)]
    return render_messages(prompt), answers[0], answers[1]


def _shared_turns(a: list[Message], b: list[Message]) -> int:
    """Return how many leading messages are the prompt: shared, and followed by the assistant in both."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    while shared and not all(len(turns) > shared and turns[shared]["role"] == "assistant" for turns in (a, b)):
        shared -= 1
    return shared


def _value(values: dict[str, Any], column: str) -> Any:
    if column not in values:
        raise BadRow("missing column", f"column '{column}' is missing; the row has: {closest_first(column, values)}")
    if values[column] is None:
        raise BadRow("missing value", f"column '{column}' is empty (null)")
    return values[column]


def text_of(values: dict[str, Any], column: str) -> str:
    """Return a column's text; raises BadRow if it is missing, of another type, or cannot be written as UTF-8."""
    return _checked_text(_value(values, column), f"column '{column}'")


def _checked_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise BadRow("wrong type", f"{what} must be text, but is {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8", f"{what} must be UTF-8 text, but is not UTF-8: {error.reason}") from None
    return text


def messages_of(values: dict[str, Any], column: str) -> list[Message]:
    """Return a column's messages; raises BadRow if they are not a list of {role, content}."""
    messages = _value(values, column)
    if not isinstance(messages, list) or not messages:
        raise BadRow("wrong type", f"column '{column}' must be a list of messages, but is {_shown(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(
                "wrong type", f"each message of '{column}' must have role and content, but one is {_shown(message)}"
            )
        if message["role"] not in ROLES:
            roles = ", ".join(ROLES)
            raise BadRow("wrong type", f"a role in '{column}' must be one of {roles}, but is {_shown(message['role'])}")
        _checked_text(message["content"], f"the content of a message of '{column}'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _mu(values: dict[str, Any], judgement: str) -> float:
    """Return the probability that a is better: as given, the mean of the votes (a tie is 1/2), or the label."""
    if not judgement:
        return 1.0
    value = _value(values, judgement)
    if judgement == "label":
        return _vote(value)
    if judgement == "votes":
        if not isinstance(value, list) or not value:
            raise BadRow("wrong type", f"column 'votes' must be a list with at least one vote, but is {_shown(value)}")
        votes = [_vote(vote[1] if isinstance(vote, list) and len(vote) == 3 else vote) for vote in value]
        return sum(votes) / len(votes)
    mu = _number(values, "mu", math.nan)
    if not 0 <= mu <= 1:
        raise BadRow("wrong type", f"column 'mu' must be a probability from 0 to 1, but is {_shown(value)}")
    return mu


def _vote(vote: Any) -> float:
    if not isinstance(vote, str) or vote not in VOTES:
        triple = "or [worker, vote, competence] with one of them"
        raise BadRow("wrong type", f"a vote must be one of {', '.join(VOTES)}, {triple}, but is {_shown(vote)}")
    return VOTES[vote]


def _number(values: dict[str, Any], column: str, default: float) -> float:
    """Return an optional number; text is converted, since every cell of a CSV file is text."""
    value = values.get(column)
    if value is None or value == "":
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("wrong type", f"column '{column}' must be a finite number, but is {_shown(value)}")
    return number


def _label(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else _checked_text(value, f"column '{column}'")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"

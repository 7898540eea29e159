"""Published layouts of preference data: from the columns of a data set's rows to `Preference` records.

Accepted are hh-rlhf text (`chosen` and `rejected` are whole dialogues with a shared beginning), explicit
prompt/chosen/rejected, lists of {role, content} messages with or without an explicit prompt, and pairs with a
probability, votes or a label instead of a fixed winner. The layout is detected once for all rows of a data set.
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
from deep_rlhf.data.sources import SourceRow, closest_first
from deep_rlhf.errors import DataError
from deep_rlhf.types import Preference

PAIR_COLUMNS = (("chosen", "rejected"), ("a", "b"), ("a1", "a2"))
VOTES = {"a": 1.0, "a1": 1.0, "b": 0.0, "a2": 0.0, "equal": 0.5, "tie": 0.5}  # probability that a is better
LARGEST_NUMBER = 1e6  # of a weight or margin: a larger one is a slip, and makes losses infinite
JUDGEMENTS = ("mu", "votes", "label")
ACCEPTED = (
    "accepted are chosen + rejected (hh-rlhf dialogues, or messages), prompt + chosen + rejected, "
    "and prompt + a + b with mu, votes or label"
)

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns hold the two responses, and how they are written."""

    a: str
    b: str
    prompt: bool  # a column `prompt` exists
    messages: bool  # the responses are lists of messages, not text
    prompt_messages: bool
    judgement: str  # the column with the probability, votes or label; "" if `a` is always the better one


def columns_of(rows: Sequence[SourceRow]) -> list[str]:
    """Returns every column that occurs in some row, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row.values))


def holds_lists(rows: Sequence[SourceRow], column: str) -> bool:
    """Whether a column holds lists rather than text, by its first value that is not null."""
    return isinstance(next((row.values[column] for row in rows if row.values.get(column) is not None), None), list)


def detect_layout(rows: Sequence[SourceRow], name: str) -> Layout:
    """Returns the layout of the rows of data set `name`.

    Raises DataError, with the columns found and the accepted ones, if they fit no layout.
    """
    columns = columns_of(rows)
    pair = next((pair for pair in PAIR_COLUMNS if set(pair) <= set(columns)), None)
    have = f"its columns are {closest_first('chosen rejected prompt', columns)}"
    if pair is None:
        raise DataError(f"{name} has no known layout of preferences: {have}; {ACCEPTED}")
    a, b = pair
    messages, prompt = holds_lists(rows, a), "prompt" in columns
    if not prompt and not messages and not any(HH.assistant in str(row.values.get(a)) for row in rows):
        markers = f"{HH.human!r} and {HH.assistant!r}"
        raise DataError(
            f"{name} has no column 'prompt' and its '{a}' is no dialogue with {markers}; {have}; {ACCEPTED}"
        )
    judgement = next((column for column in JUDGEMENTS if column in columns), "")
    if a == "chosen":
        # The winner is known, so columns called votes or label may mean something else.
        votes = judgement != "votes" or holds_lists(rows, "votes")
        labels = judgement != "label" or any(row.values.get("label") in tuple(VOTES) for row in rows)
        judgement = judgement if votes and labels else ""
    elif not judgement:
        raise DataError(
            f"{name} has '{a}' and '{b}' but no mu, votes or label, so the better one is unknown; {have}; {ACCEPTED}"
        )
    return Layout(a, b, prompt, messages, prompt and holds_lists(rows, "prompt"), judgement)


def to_preference(row: SourceRow, layout: Layout, template: Template, source: str) -> Preference | str:
    """Returns the preference of a row, or the reason to drop it. Raises BadRow if the row is malformed."""
    values = row.values
    mu = _mu(values, layout.judgement)
    texts = pair_texts(row, layout, template)
    if texts is None:
        return "no shared prompt"
    prompt, a, b = texts
    if not a.strip() or not b.strip():
        return "empty response"
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


def pair_texts(row: SourceRow, layout: Layout, template: Template) -> tuple[str, str, str] | None:
    """Returns (prompt, a, b) as text, or None if the two dialogues share no prompt. Raises BadRow if it is malformed.

    hh-rlhf text is split after the last assistant marker that both dialogues share, so `prompt + a` is the original
    dialogue; where two dialogues differ before their last turn, the responses hold all further turns. Messages have
    turns, so they become hh-rlhf text under every template.
    """
    if layout.messages:
        return _message_texts(row, layout)
    a, b = text_of(row.values, layout.a), text_of(row.values, layout.b)
    if layout.prompt_messages:
        return render_messages(messages_of(row.values, "prompt")), HH.response(a), HH.response(b)
    if layout.prompt:
        return template.prompt(text_of(row.values, "prompt")), template.response(a), template.response(b)
    cut = os.path.commonprefix([a, b]).rfind(HH.assistant)  # noqa: RUF071 (text, not paths)
    if cut < 0:
        return None
    cut += len(HH.assistant)
    return a[:cut], a[cut:], b[cut:]


def _message_texts(row: SourceRow, layout: Layout) -> tuple[str, str, str] | None:
    a, b = messages_of(row.values, layout.a), messages_of(row.values, layout.b)
    if layout.prompt_messages:
        prompt = messages_of(row.values, "prompt")
    else:
        shared = _shared_turns(a, b)
        prompt, a, b = a[:shared], a[shared:], b[shared:]
        if not prompt and layout.prompt:
            prompt = [{"role": "user", "content": text_of(row.values, "prompt")}]
    if not prompt:
        return None
    for column, messages in ((layout.a, a), (layout.b, b)):
        if messages[0]["role"] != "assistant":
            raise BadRow(
                "wrong type", f"column '{column}' must continue with the assistant, not with {messages[0]['role']}"
            )
    responses = [HH.response(messages[0]["content"]) + render_turns(messages[1:]) for messages in (a, b)]
    return render_messages(prompt), responses[0], responses[1]


def _shared_turns(a: list[Message], b: list[Message]) -> int:
    """Returns how many leading messages layout the prompt: shared, and followed by the assistant in both dialogues."""
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
    """Returns the text of a column. Raises BadRow if it is missing, not text, or cannot be encoded as UTF-8."""
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
    """Returns the messages of a column. Raises BadRow if they are not a list of {role, content}."""
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
    """Returns the probability that a is better: as given, the mean of the votes (a tie counts 1/2), or the label."""
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
    """Returns an optional number; text is converted, since every cell of a CSV file is text."""
    value = values.get(column)
    if value is None or value == "":
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("wrong type", f"column '{column}' must be a finite number, but is {_shown(value)}")
    if abs(number) > LARGEST_NUMBER:
        raise BadRow("wrong type", f"column '{column}' must be at most {LARGEST_NUMBER:g}, but is {_shown(value)}")
    return number


def _label(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else _checked_text(value, f"column '{column}'")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a list in a list in a list …, or an integer of thousands of digits
        return type(value).__name__
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"

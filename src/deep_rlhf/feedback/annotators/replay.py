"""A labelled file as annotators: each vote in it is given again by who gave it, disagreement included.

Read are the files that reward_modeling.py takes (a row without `votes` is one answer, by its `annotator`), and rows
whose votes are [worker, vote, competence]. Rows without texts take them from `arguments.jsonl(.gz)` beside the file, by
the two ids that their own id joins with "_" (Habernal & Gurevych 2016).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deep_rlhf.data.chat import Template, get_template
from deep_rlhf.data.layouts import VOTES
from deep_rlhf.data.preferences import load_preferences
from deep_rlhf.data.readers import BadRow, read_table
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.records import CHOICES, Choice, Comparison, Label
from deep_rlhf.feedback.store import PortableLabel, Store

TEXTS = ("arguments.jsonl.gz", "arguments.jsonl")
ALONE = "replay"  # who answered where the file does not say


@dataclass(frozen=True, slots=True)
class Voted:
    """A pair with what each annotator said of it, in the file's order."""

    prompt: str
    a: str
    b: str
    votes: tuple[tuple[str, Choice], ...]


class Replay:
    """Gives the votes of a file, one after the other, each as an answer of the annotator who gave it.

    Pairs come in an order drawn from `seed`, so that a few of them are a fair sample. A vote that the store has already
    is passed over, so after a stop it goes on where it was.
    """

    brings_questions = True

    def __init__(self, pairs: Sequence[Voted], *, seed: int = 0) -> None:
        order = sorted(range(len(pairs)), key=lambda row: _digest(str(seed), pairs[row].prompt, str(row)))
        self._pairs = [pairs[row] for row in order]
        self._votes = [(pair, *vote) for pair in self._pairs for vote in pair.votes]
        self._next = 0

    @property
    def prompts(self) -> list[str]:
        """The different prompts of the file."""
        return list(dict.fromkeys(pair.prompt for pair in self._pairs))

    def answer(self, store: Store, most: int) -> int:
        """Gives up to `most` votes; 0 when the file is through."""
        done = 0
        while done < most and self._next < len(self._votes):
            done += store.take_in([_given(*self._votes[self._next])])
            self._next += 1
        return done


def read_votes(path: str | Path, *, template: str = "hh") -> list[Voted]:
    """The pairs of a labelled file, in its order; a second vote of one annotator on a pair is left out.

    Raises UserError, with file and line, for what is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file '{path}' to replay: give labelled pairs, as reward_modeling.py takes them.")
    rows = list(read_table(path))
    if any(isinstance(row, dict) and _has_workers(row) for _, row in rows):
        texts = _texts(path)
        pairs = [_voted(row, f"{path}, {where}", texts, get_template(template)) for where, row in rows]
        return [pair for pair in pairs if pair.a.strip() != pair.b.strip()]
    preferences, _ = load_preferences(str(path), split="train", template=template)
    found: dict[tuple[str, str, str], dict[str, Choice]] = {}
    for one in preferences:
        choice = CHOICES[1.0 if one.mu > 0.5 else 0.0 if one.mu < 0.5 else 0.5]
        found.setdefault((one.prompt, one.a, one.b), {}).setdefault(one.annotator or ALONE, choice)
    return [Voted(*texts_, tuple(votes.items())) for texts_, votes in found.items()]


def _given(pair: Voted, worker: str, choice: Choice) -> PortableLabel:
    question = _digest(pair.prompt, pair.a, pair.b)
    label = Label(
        event_id=0,
        comparison_id=0,
        comparison=Comparison(prompt=pair.prompt, answers=(pair.a, pair.b), why_selected="initial"),
        annotator=worker,
        choice=choice,
        ranks=None,
        strength=None,
        shown_order=(0, 1),
        seconds=0.0,
        created=datetime.now(UTC),
    )
    return PortableLabel(label=label, token=f"replay {_digest(question, worker)}", question=f"replay {question}")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:32]


def _has_workers(row: dict[str, Any]) -> bool:
    votes = row.get("votes")
    return isinstance(votes, list) and any(isinstance(vote, list) for vote in votes)


def _voted(row: dict[str, Any] | BadRow, where: str, texts: dict[str, str], template: Template) -> Voted:
    if isinstance(row, BadRow):
        raise UserError(f"{where}: {row}.")
    try:
        prompt = str(row.get("prompt") or str(row["topic"]).replace("_", ": ").replace("-", " "))
        a, b = _answers(row, texts)
        votes: dict[str, Choice] = {}
        for worker, vote, *_ in row["votes"]:
            votes.setdefault(f"worker-{worker}" if isinstance(worker, int) else str(worker), CHOICES[VOTES[vote]])
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(
            f"{where}: a row to replay has prompt or topic, two answers, and votes [worker, a1 or a2 or equal, …];"
            f" here {problem} is missing or wrong."
        ) from None
    return Voted(template.prompt(prompt), template.response(a), template.response(b), tuple(votes.items()))


def _answers(row: dict[str, Any], texts: dict[str, str]) -> tuple[str, str]:
    for a, b in (("a", "b"), ("a1", "a2")):
        if a in row and b in row:
            return row[a], row[b]
    first, second = str(row["id"]).split("_")
    return texts[first], texts[second]


def _texts(path: Path) -> dict[str, str]:
    """The answers by their ids, if they have a file of their own."""
    beside = next((path.parent / name for name in TEXTS if (path.parent / name).is_file()), None)
    rows = read_table(beside) if beside else ()
    wanted = {"id", "text"}
    return {str(row["id"]): str(row["text"]) for _, row in rows if isinstance(row, dict) and wanted <= row.keys()}

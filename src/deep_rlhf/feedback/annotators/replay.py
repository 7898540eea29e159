"""Replays a labelled file: each vote in it becomes a label of the annotator who gave it, disagreement included.

Accepted are the files that reward_modeling.py reads (a row without `votes` is one label, by its `annotator`), and rows
whose votes are [worker, vote, competence]. Rows without texts take them from `arguments.jsonl(.gz)` in the same folder,
by the two ids that their own id joins with "_" (Habernal & Gurevych 2016).
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
from deep_rlhf.errors import DataError
from deep_rlhf.feedback.records import CHOICES, Choice, Comparison, Label
from deep_rlhf.feedback.store import PortableLabel, Store

TEXT_FILES = ("arguments.jsonl.gz", "arguments.jsonl")
UNNAMED_ANNOTATOR = "replay"  # where the file names none


@dataclass(frozen=True, slots=True)
class VotedPair:
    """A pair with the choice of each annotator, in the file's order."""

    prompt: str
    a: str
    b: str
    votes: tuple[tuple[str, Choice], ...]  # (annotator, choice)


class Replay:
    """A labeler that adds the votes of a file to the store, one label per vote.

    Pairs come in a random order drawn from `seed`, so that the first few are a fair sample. Votes that the store has
    are skipped, so a replay that was interrupted continues where it stopped.
    """

    brings_questions = True

    def __init__(self, pairs: Sequence[VotedPair], *, seed: int = 0) -> None:
        order = sorted(range(len(pairs)), key=lambda row: _digest(str(seed), pairs[row].prompt, str(row)))
        self._pairs = [pairs[row] for row in order]
        self._votes = [(pair, *vote) for pair in self._pairs for vote in pair.votes]
        self._next = 0

    @property
    def prompts(self) -> list[str]:
        """The different prompts of the file."""
        return list(dict.fromkeys(pair.prompt for pair in self._pairs))

    def label(self, store: Store, most: int) -> int:
        """Adds up to `most` labels; returns how many, 0 at the end of the file."""
        done = 0
        while done < most and self._next < len(self._votes):
            done += store.import_labels([_portable_label(*self._votes[self._next])])
            self._next += 1
        return done


def read_votes(path: str | Path, *, template: str = "hh") -> list[VotedPair]:
    """Reads the pairs of a labelled file, in its order; a second vote of one annotator on a pair is left out.

    Raises DataError, with file and line, for a malformed row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file '{path}' to replay: give labelled pairs, as reward_modeling.py reads them.")
    rows = list(read_table(path))
    if any(isinstance(row, dict) and _has_workers(row) for _, row in rows):
        texts = _texts(path)
        pairs = [_voted_pair(row, f"{path}, {where}", texts, get_template(template)) for where, row in rows]
        return [pair for pair in pairs if pair.a.strip() != pair.b.strip()]
    preferences, _ = load_preferences(str(path), split="train", template=template)
    found: dict[tuple[str, str, str], dict[str, Choice]] = {}
    for one in preferences:
        choice = CHOICES[1.0 if one.mu > 0.5 else 0.0 if one.mu < 0.5 else 0.5]
        found.setdefault((one.prompt, one.a, one.b), {}).setdefault(one.annotator or UNNAMED_ANNOTATOR, choice)
    return [VotedPair(*pair, tuple(votes.items())) for pair, votes in found.items()]


def _portable_label(pair: VotedPair, worker: str, choice: Choice) -> PortableLabel:
    question = _digest(pair.prompt, pair.a, pair.b)
    label = Label(
        event_id=0,
        comparison_id=0,
        comparison=Comparison(prompt=pair.prompt, responses=(pair.a, pair.b), why_selected="initial"),
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


def _voted_pair(row: dict[str, Any] | BadRow, where: str, texts: dict[str, str], template: Template) -> VotedPair:
    if isinstance(row, BadRow):
        raise DataError(f"{where}: {row}.")
    try:
        prompt = str(row.get("prompt") or str(row["topic"]).replace("_", ": ").replace("-", " "))
        a, b = _responses(row, texts)
        if not isinstance(a, str) or not isinstance(b, str):
            raise TypeError("text in both responses")
        votes: dict[str, Choice] = {}
        for worker, vote, *_ in row["votes"]:
            votes.setdefault(f"worker-{worker}" if isinstance(worker, int) else str(worker), CHOICES[VOTES[vote]])
    except (KeyError, TypeError, ValueError) as problem:
        raise DataError(
            f"{where}: a row to replay must have prompt or topic, two responses, and votes [worker, a1 or a2 or equal,"
            f" …]; here {problem} is missing or wrong."
        ) from None
    return VotedPair(template.prompt(prompt), template.response(a), template.response(b), tuple(votes.items()))


def _responses(row: dict[str, Any], texts: dict[str, str]) -> tuple[str, str]:
    for a, b in (("a", "b"), ("a1", "a2")):
        if a in row and b in row:
            return row[a], row[b]
    first, second = str(row["id"]).split("_")
    return texts[first], texts[second]


def _texts(path: Path) -> dict[str, str]:
    """The texts by id, from the text file in the same folder; empty without one."""
    beside = next((path.parent / name for name in TEXT_FILES if (path.parent / name).is_file()), None)
    rows = read_table(beside) if beside else ()
    wanted = {"id", "text"}
    return {str(row["id"]): str(row["text"]) for _, row in rows if isinstance(row, dict) and wanted <= row.keys()}

"""Reads labels from files that are no exports: any layout of preferences that `reward_modeling.py` reads."""

import hashlib
import json
from datetime import datetime
from typing import Any

from deep_rlhf.data.chat import Template
from deep_rlhf.data.layouts import VOTES, Layout, to_preference
from deep_rlhf.data.readers import BadRow
from deep_rlhf.data.sources import SourceRow
from deep_rlhf.feedback.records import CHOICES, Choice, Comparison, Label
from deep_rlhf.feedback.reward_refit.preferences import text_id
from deep_rlhf.feedback.store import PortableLabel
from deep_rlhf.types import Preference

UNNAMED_ANNOTATOR = "import"  # where the file names none


class ForeignRows:
    """Turns the rows of a foreign file into labels.

    Such a file has no keys, so a label is identified by its texts, its annotator and how often that annotator has
    judged these texts before: a file that is read twice gives the same labels.
    """

    def __init__(self, layout: Layout, template: Template, source: str, now: datetime) -> None:
        self._layout, self._template, self._source, self._now = layout, template, source, now
        self._times: dict[tuple[str, str], int] = {}

    def labels_of(self, row: SourceRow) -> list[PortableLabel] | str:
        """The labels of a row, one per vote, or the reason to drop it; raises BadRow if it is malformed."""
        pair = to_preference(row, self._layout, self._template, self._source)
        if isinstance(pair, str):
            return pair
        name = pair.annotator or UNNAMED_ANNOTATOR
        if self._layout.judgement == "votes":
            return [self._label(pair, *_vote(vote, f"{name} {i}")) for i, vote in enumerate(row.values["votes"], 1)]
        if pair.mu not in CHOICES:
            expected = "one person's label, 1, 0 or 0.5; for the labels of several people give a column 'votes'"
            raise BadRow("not one label", f"column 'mu' must be {expected}, but is {pair.mu}")
        return [self._label(pair, name, CHOICES[pair.mu])]

    def _label(self, pair: Preference, annotator: str, choice: Choice) -> PortableLabel:
        content = text_id(pair.prompt, (pair.a, pair.b))
        times = self._times[content, annotator] = self._times.get((content, annotator), 0) + 1
        token = hashlib.sha256(json.dumps([content, annotator, times]).encode()).hexdigest()[:32]
        label = Label(
            event_id=0,
            comparison_id=0,
            comparison=Comparison(prompt=pair.prompt, responses=(pair.a, pair.b)),
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
    """The annotator and choice of a vote, which `to_preference` has validated."""
    who, value = (str(vote[0]), vote[1]) if isinstance(vote, list) else (voter, vote)
    return who, CHOICES[VOTES[value]]

"""Turns labels into preferences: which labels a reward model learns from, and what each of them says.

One pair has up to three ids, each for one purpose:
- `text_id`: a hash of the texts, in `Preference.id` of exported pairs, so that whoever trains on the file puts a pair
  that was labelled twice into the same bootstrap bag;
- `<event id>-<number>` from `training_preferences`: one label and one pair of its ranking, so that predictions and
  error rates can be traced back to the label;
- `bootstrap.bag_id`: the texts in any order and the ensemble's seed, which decides the bag within a refit.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

from deep_rlhf.feedback.records import FOR_LABEL, MU, Label
from deep_rlhf.types import Preference

# Reasons that measure annotators: training on them would count a pair twice, or teach a trick question.
FOR_RELIABILITY = ("gold", "repeat")


def text_id(prompt: str, responses: tuple[str, ...]) -> str:
    """16 hexadecimal digits that depend on the texts alone."""
    return hashlib.sha256(json.dumps([prompt, *responses]).encode()).hexdigest()[:16]


def label_preferences(label: Label) -> list[Preference]:
    """What a label says: one preference for a pair, all pairs for a ranking, none for "can't tell".

    A tie is μ = 1/2 (Christiano et al. 2017, section 2.2.2). The pairs of a ranking of K have weight 2/K each and so
    count as K − 1 pairs together: K − 1 comparisons of neighbours imply the rest. (Ouyang et al. 2022, section 3.5,
    also train on all pairs, and count each ranking as one.)
    """
    comparison = label.comparison
    prompt, responses = comparison.prompt, comparison.responses
    name = text_id(prompt, responses)
    if label.ranks is None:
        mu = MU[label.choice or "cant_tell"]
        if mu is None:
            return []
        a, b = responses
        return [Preference(prompt=prompt, a=a, b=b, mu=mu, id=name, source="store", annotator=label.annotator)]
    return [
        Preference(
            prompt=prompt,
            a=responses[i],
            b=responses[j],
            mu=(1.0 + (label.ranks[i] < label.ranks[j]) - (label.ranks[i] > label.ranks[j])) / 2,
            weight=2 / len(responses),
            id=f"{name}-{i}-{j}",
            source="store",
            annotator=label.annotator,
        )
        for i, j in combinations(range(len(responses)), 2)
    ]


def all_preferences(labels: Iterable[Label]) -> list[Preference]:
    """The preferences of all labels but those that only measure the annotator, in order.

    Pairs of equal texts are dropped, as `load_preferences` drops them.
    """
    return [
        pair
        for label in labels
        if label.comparison.why_selected not in FOR_RELIABILITY
        for pair in label_preferences(label)
        if pair.a.strip() != pair.b.strip()
    ]


def training_labels(labels: Iterable[Label]) -> int:
    """How many of the labels a reward model can learn from, as Store.label_count counts them."""
    return sum(label.choice != "cant_tell" and label.comparison.why_selected in FOR_LABEL for label in labels)


def training_preferences(labels: Iterable[Label]) -> tuple[list[Preference], dict[str, Label]]:
    """The preferences that the loop's reward model learns from, and the label of each by its id.

    Each id belongs to one label, because two people may label the same pair. Blind pairs are left out: they test the
    reward model, which must not have learned from them.
    """
    preferences: list[Preference] = []
    source: dict[str, Label] = {}
    for label in labels:
        if label.comparison.why_selected not in FOR_LABEL:
            continue
        for number, pair in enumerate(all_preferences([label])):
            preferences.append(replace(pair, id=f"{label.event_id}-{number}"))
            source[preferences[-1].id] = label
    return preferences, source

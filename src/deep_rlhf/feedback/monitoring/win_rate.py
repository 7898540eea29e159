"""The win rate of the current policy against the start policy, from labels of blind pairs."""

from collections.abc import Collection, Sequence

from deep_rlhf.evaluation.comparison import wilson_interval
from deep_rlhf.feedback.records import MU, Label, Version
from deep_rlhf.feedback.state import PolicyWinRate

WIN_RATE_LABELS = 60  # the newest ones; older ones are about older policies
RECENT_VERSIONS = 10  # of the policy, that a win rate may be about
BACK_AT = "back_at"  # in the figures of a version made by a roll-back: the number of the version it restored


def win_rate(pairs: Sequence[Label]) -> PolicyWinRate | None:
    """How often the newer policy won these blind pairs, with the 95 % interval; None if no pair is decided.

    A tie counts ½. `first` and `last` are the oldest and the newest version among the pairs.
    """
    won = {label.event_id: won for label in pairs if (won := won_by_newer(label)) is not None}
    if not won:
        return None
    rate = sum(won.values()) / len(won)
    low, high = wilson_interval(rate, len(won))
    newer = [max(label.comparison.writers) for label in pairs if label.event_id in won]
    return PolicyWinRate(rate=rate, low=low, high=high, labels=len(won), first=min(newer), last=max(newer))


def blind_pairs(labels: Sequence[Label], recent: Collection[int]) -> list[Label]:
    """The newest decided labels of blind pairs whose newer policy is one of the versions `recent`."""
    pairs = [label for label in labels if won_by_newer(label) is not None]
    return [label for label in pairs if max(label.comparison.writers) in recent][-WIN_RATE_LABELS:]


def recent_versions(policies: Sequence[Version]) -> set[int]:
    """The newest version of the policy and the last few before it, without those that a roll-back discarded."""
    known = {version.number: version for version in policies}
    number, found = max(known, default=0), set[int]()
    while number in known and len(found) < RECENT_VERSIONS:
        found.add(number)
        number = int(known[number].figures.get(BACK_AT, number - 1))
    return found


def won_by_newer(label: Label) -> float | None:
    """1, ½ or 0 for a blind pair: whether the newer policy's response was preferred. None for any other label."""
    if label.imported or label.comparison.why_selected != "win_rate":
        return None
    if label.choice is None or len(label.comparison.writers) != 2:
        return None
    mu = MU[label.choice]
    first, second = label.comparison.writers
    return mu if mu is None or first > second else 1 - mu

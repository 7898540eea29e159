"""What a person should look at while a policy learns from a reward that people taught: figures, limits, alarms.

Each alarm has a limit and an action: warn, stop, or roll back to the best version. The figures are computed by the
functions at the end of this file, or are at hand in the metrics of an update.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from deep_rlhf.errors import UserError
from deep_rlhf.feedback.records import Alarm
from deep_rlhf.types import Preference, Scorer

Action = Literal["warn", "stop", "roll_back"]
ACTIONS: tuple[Action, ...] = get_args(Action)
SMOOTHED = 5  # updates that a mean reward is averaged over before two of them are compared
CALM = 0.1  # a figure must come back by this share of its limit before the same alarm can be raised again
ENOUGH = 10  # pairs for an interval of their mean; of fewer nothing is said
Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Limit:
    """How far a figure may go, and what happens beyond; without a limit, nothing."""

    limit: float | None
    action: Action = "warn"

    @classmethod
    def read(cls, text: str) -> "Limit":
        """`0.5`, `0.5:stop` or `off`. Raises UserError for anything else."""
        if text == "off":
            return cls(None)
        limit, _, action = text.partition(":")
        try:
            number = float(limit)
        except ValueError:
            number = math.nan
        action = action or "warn"
        if not math.isfinite(number) or action not in ACTIONS:
            raise UserError(f"An alarm is off, or a limit with {', '.join(ACTIONS)}, as in 0.5:stop; not {text!r}.")
        return cls(number, next(known for known in ACTIONS if known == action))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limit of each alarm. Figures above their limit raise it; of those in `LOWEST`, figures below."""

    held_out_gap: Limit = Limit(0.5)  # standard deviations of the reward
    ensemble_std: Limit = Limit(1.0)  # the same unit; members that agree on nothing are nearly 1 apart
    length_ratio: Limit = Limit(2.0)  # times as long, or as short, as at the start
    entropy_ratio: Limit = Limit(0.2)  # of the entropy at the start
    repetition: Limit = Limit(0.3)  # share of word triples that were there before
    kl: Limit = Limit(30.0)  # nats per answer
    win_rate_gap: Limit = Limit(0.1)  # by which the prediction is too high, beyond chance
    reward_sign: Limit = Limit(0.0, "stop")  # the advantage of what people preferred, at best

    @classmethod
    def read(cls, settings: Iterable[str]) -> "Limits":
        """From `name=limit:action`, each as in `Limit.read`; the others keep their defaults. Raises UserError."""
        changed: dict[str, Limit] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if name not in NAMES or not equals:
                raise UserError(f"An alarm is set as in kl=20:stop, with one of {', '.join(NAMES)}; not {setting!r}.")
            changed[name] = Limit.read(text)
            if name == "reward_sign" and changed[name].action == "roll_back":
                raise UserError("The alarm reward_sign cannot roll_back: the reward is wrong. Give warn or stop.")
        return replace(cls(), **changed)


NAMES = tuple(field.name for field in fields(Limits))
LOWEST = frozenset({"entropy_ratio", "reward_sign"})  # a figure below the limit is the bad one
# {one} and {two} stand for that many digits, or more: see _sentence. z writes no minus before a zero.
_SAYS = {
    "held_out_gap": "The reward rises and the held-out reward falls with it: they are {figure:z.{two}f} apart",
    "ensemble_std": "The members of the reward model disagree: their spread is {figure:z.{two}f}",
    "length_ratio": "Answers are {figure:z.{two}f} times as long as at the start",
    "entropy_ratio": "The policy has few words left: its entropy is {figure:z.{two}f} of that at the start",
    "repetition": "Answers repeat themselves: {figure:z.{none}%} of their word triples were there before",
    "kl": "The policy is {figure:z.{one}f} nats away from the start",
    "win_rate_gap": "The reward model promises a win rate that is surely {figure:z.{two}f} higher than what people say",
    "reward_sign": "On labelled pairs the reward prefers what people did not: the advantage is at best"
    " {figure:z.{two}f}",
}
MOST_DIGITS = 6  # more than the fewest, as many as `:g` gives a limit


def check(figures: Mapping[str, float | None], limits: Limits, step: int) -> list[Alarm]:
    """An alarm for each of `figures` that is beyond its limit, or infinite or NaN. Other names, and None, are left out.

    The length ratio counts both ways: an answer half as long is as far away as one twice as long.
    """
    known = [(name, figures.get(name)) for name in NAMES]
    return [alarm for name, figure in known if figure is not None and (alarm := _beyond(name, figure, limits, step))]


class Watch:
    """`check` from update to update: what was raised is raised again only after its figure had come back.

    It has come back when it is within the limit by a tenth of it, so that a figure that trembles at its limit raises
    one alarm. `raised` may be kept and handed in again when a run is resumed.
    """

    def __init__(self, limits: Limits, raised: Iterable[str] = ()) -> None:
        self.limits = limits
        self.raised = set(raised)

    def check(self, figures: Mapping[str, float | None], step: int) -> list[Alarm]:
        """The new alarms of this update."""
        new = [alarm for alarm in check(figures, self.limits, step) if alarm.name not in self.raised]
        self.raised = {name for name in self.raised if not self._is_calm(name, figures.get(name))}
        self.raised |= {alarm.name for alarm in new}
        return new

    def reset(self) -> None:
        """After a roll-back, which leaves the figures that raised the alarms behind."""
        self.raised.clear()

    def keeps(self, figures: Mapping[str, float | None]) -> bool:
        """Whether a policy of these figures may be rolled back to: none is near a limit that would roll it back again.

        A figure that is not there says nothing.
        """
        names = [name for name in NAMES if getattr(self.limits, name).action == "roll_back" and name in figures]
        return all(self._is_calm(name, figures[name]) for name in names)

    def _is_calm(self, name: str, figure: float | None) -> bool:
        limit = getattr(self.limits, name).limit
        if figure is None:
            return False
        if limit is None:
            return True
        room = CALM * abs(limit)
        calmer = limit + room if name in LOWEST else limit - room
        return not _is_beyond(name, figure, calmer)


def _beyond(name: str, figure: float, limits: Limits, step: int) -> Alarm | None:
    limit: Limit = getattr(limits, name)
    if limit.limit is None or not _is_beyond(name, figure, limit.limit):
        return None
    message = _sentence(name, figure, limit.limit)
    return Alarm(name=name, step=step, action=limit.action, message=message, figure=figure, limit=limit.limit)


def _sentence(name: str, figure: float, limit: float) -> str:
    """With as many digits as it takes: a figure beyond its limit must not read as if it were at it."""
    if name == "length_ratio" and figure < 1 < limit:
        limit = 1 / limit
    for more in range(MOST_DIGITS + 1):
        digits = {"none": more, "one": more + 1, "two": more + 2}
        said, at_limit = (_SAYS[name].format(figure=value, **digits) for value in (figure, limit))
        if said != at_limit:
            break
    return f"{said} (limit {limit:g})."


def _is_beyond(name: str, figure: float, limit: float) -> bool:
    if not math.isfinite(figure):
        return True
    if name in LOWEST:
        return figure < limit
    if name == "length_ratio":
        return figure <= 0 or max(figure, 1 / figure) > limit
    return figure > limit


# ---- figures


def held_out_gap(rewards: Sequence[float], held_out: Sequence[float]) -> float:
    """How far the reward has gone up while a held-out reward model's went down (Gao et al. 2022), since the best point.

    rewards, held_out: mean normalised reward of each update's answers, by the reward model that the policy is trained
    against and by one that it never sees, without the jumps from one fit of them to the next. The best point is where
    the held-out reward, averaged over five updates, was highest. 0 if the reward has not risen or the held-out one has
    not fallen since.
    """
    trained, unseen = _smooth(rewards), _smooth(held_out)
    if not unseen:
        return 0.0
    best = _best(unseen)
    rise, fall = trained[-1] - trained[best], unseen[best] - unseen[-1]
    return rise + fall if rise > 0 and fall > 0 else 0.0


def since_best(rewards: list[float], held_out: list[float]) -> tuple[list[float], list[float]]:
    """Both series without what `held_out_gap` will never look at again: all before the best point."""
    unseen = _smooth(held_out)
    first = _best(unseen) if unseen else 0
    return rewards[first:], held_out[first:]


def repetition(texts: Sequence[str], *, words: int = 3) -> float:
    """Share of the word n-grams of a text that it had before: 1 − distinct / all, mean over the texts.

    seq-rep-n of Welleck et al. 2019, with triples, for answers are short; a text of fewer words counts 0.
    """
    shares = []
    for text in texts:
        split = text.split()
        grams = [tuple(split[i : i + words]) for i in range(len(split) - words + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def win_rate_gap(predicted: Sequence[float], answers: Sequence[float], *, label_noise: float = 0.1) -> float | None:
    """By how much the predicted win rate surely exceeds people's: the lower end of the 95 % interval of the difference.

    predicted: P(the current policy's answer is better) of each pair that people compared; answers: 1, ½ or 0. A share
    `label_noise` of answers is random, so no prediction exceeds 1 − e/2. None below ten pairs.
    """
    if len(answers) < ENOUGH:
        return None
    pairs = zip(predicted, answers, strict=True)
    gaps = [(1 - label_noise) * p + label_noise / 2 - answer for p, answer in pairs]
    return _interval(gaps, [1.0] * len(gaps))[0]


def sign_self_test(scorer: Scorer, preferences: Sequence[Preference]) -> float | None:
    """Mean reward of what people preferred minus that of what they did not, at best: below 0 the sign is surely wrong.

    "At best": the upper end of the 95 % interval, for the mean of a few pairs may well be negative by chance. Asks the
    scorer as PPO does, so a reward that is negated, or normalised by a negative number, between fit and use is seen.
    Mean of the members; each pair counts by how decided people were, |2 mu − 1|, times its weight. None below ten
    decided pairs.
    """
    decided = [pair for pair in preferences if pair.mu != 0.5 and pair.weight > 0]
    if len(decided) < ENOUGH:
        return None
    prompts = [pair.prompt for pair in decided]
    a, b = (scorer.score(prompts, [getattr(pair, side) for pair in decided]).mean(dim=1) for side in ("a", "b"))
    signs = [1.0 if pair.mu > 0.5 else -1.0 for pair in decided]
    advantages = [sign * advantage for sign, advantage in zip(signs, (a - b).tolist(), strict=True)]
    return _interval(advantages, [pair.weight * abs(2 * pair.mu - 1) for pair in decided])[1]


def _interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a weighted mean, by the normal approximation; of two values or more."""
    total, count = sum(weights), len(values)
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / total
    squares = sum((w * (value - mean)) ** 2 for w, value in zip(weights, values, strict=True))
    margin = Z_95 * math.sqrt(squares * count / (count - 1)) / total
    return mean - margin, mean + margin


def _best(unseen: Sequence[float]) -> int:
    return max(range(len(unseen)), key=unseen.__getitem__)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means of each SMOOTHED neighbours; none while there are fewer."""
    return [sum(values[i - SMOOTHED : i]) / SMOOTHED for i in range(SMOOTHED, len(values) + 1)]

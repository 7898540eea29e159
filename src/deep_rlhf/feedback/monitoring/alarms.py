"""Alarms: figures that indicate over-optimisation or collapse of the policy, their limits, and what happens beyond.

The action of an alarm is to warn, to stop the loop, or to roll the policy back to its best version. The figures are
computed by the functions at the end of this file, or come from the metrics of an update.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from deep_rlhf.errors import ConfigError
from deep_rlhf.evaluation.comparison import Z_95
from deep_rlhf.feedback.records import Alarm
from deep_rlhf.types import Preference, Scorer

Action = Literal["warn", "stop", "roll_back"]
ACTIONS: tuple[Action, ...] = get_args(Action)
SMOOTHED = 5  # updates over which a mean reward is averaged
RECOVERY = 0.1  # an alarm can be raised again once its figure is within the limit by this share of it
LEAST_PAIRS = 10  # for an interval of their mean


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a figure and the action beyond it; None: the alarm is off."""

    limit: float | None
    action: Action = "warn"

    @classmethod
    def read(cls, text: str) -> "Limit":
        """Reads `0.5`, `0.5:stop` or `off`. Raises ConfigError for anything else."""
        if text == "off":
            return cls(None)
        limit, _, action = text.partition(":")
        try:
            number = float(limit)
        except ValueError:
            number = math.nan
        action = action or "warn"
        if not math.isfinite(number) or action not in ACTIONS:
            raise ConfigError(f"An alarm is off, or a limit with {', '.join(ACTIONS)}, as in 0.5:stop; not {text!r}.")
        return cls(number, next(known for known in ACTIONS if known == action))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limit of each alarm: an upper one, or a lower one for the names in `LOWER_LIMITS`."""

    held_out_gap: Limit = Limit(0.5)  # in standard deviations of the reward
    ensemble_std: Limit = Limit(1.0)  # the same unit; close to 1 for members that are uncorrelated
    length_ratio: Limit = Limit(2.0)  # response length / length at the start, or the inverse
    entropy_ratio: Limit = Limit(0.2)  # entropy / entropy at the start
    repetition: Limit = Limit(0.3)  # share of word triples that repeat
    kl: Limit = Limit(30.0)  # nats per response
    win_rate_gap: Limit = Limit(0.1)  # lower end of the interval of predicted minus actual win rate
    reward_sign: Limit = Limit(0.0, "stop")  # upper end of the interval of preferred minus rejected reward

    @classmethod
    def read(cls, settings: Iterable[str]) -> "Limits":
        """Reads `name=limit:action` settings (see `Limit.read`); the others keep their defaults. Raises ConfigError."""
        changed: dict[str, Limit] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if name not in NAMES or not equals:
                raise ConfigError(f"An alarm is set as in kl=20:stop, with one of {', '.join(NAMES)}; not {setting!r}.")
            changed[name] = Limit.read(text)
            if name == "reward_sign" and changed[name].action == "roll_back":
                raise ConfigError("The alarm reward_sign cannot roll_back: the reward is wrong. Give warn or stop.")
        return replace(cls(), **changed)


NAMES = tuple(field.name for field in fields(Limits))
LOWER_LIMITS = frozenset({"entropy_ratio", "reward_sign"})
# The precision is {none}, {one} or {two} digits, or more: see `_sentence`. "z" formats a rounded negative zero as 0.
_MESSAGES = {
    "held_out_gap": "The reward rises while the held-out reward falls: the gap is {figure:z.{two}f}",
    "ensemble_std": "The members of the reward model disagree: their standard deviation is {figure:z.{two}f}",
    "length_ratio": "Responses are {figure:z.{two}f} times as long as at the start",
    "entropy_ratio": "The policy's entropy has collapsed to {figure:z.{two}f} of that at the start",
    "repetition": "Responses repeat themselves: {figure:z.{none}%} of their word triples occurred before",
    "kl": "The KL divergence from the start policy is {figure:z.{one}f} nats",
    "win_rate_gap": "The reward model predicts a win rate at least {figure:z.{two}f} above that of people's labels",
    "reward_sign": "The reward prefers the responses that people rejected: preferred minus rejected is at most"
    " {figure:z.{two}f}",
}
MOST_EXTRA_DIGITS = 6  # as many as `:g` gives a limit


def check(figures: Mapping[str, float | None], limits: Limits, step: int) -> list[Alarm]:
    """An alarm for each of `figures` that is beyond its limit or not finite. Other names, and None, are ignored.

    The length ratio counts in both directions: half as long is as far as twice as long.
    """
    known = [(name, figures.get(name)) for name in NAMES]
    return [alarm for name, figure in known if figure is not None and (alarm := _beyond(name, figure, limits, step))]


class AlarmTracker:
    """Checks figures from update to update, and raises an alarm again only after its figure has recovered.

    A figure has recovered when it is within the limit by a tenth of it (hysteresis): a figure that oscillates around
    its limit raises one alarm. `raised` can be saved and passed in again when a run is resumed.
    """

    def __init__(self, limits: Limits, raised: Iterable[str] = ()) -> None:
        self.limits = limits
        self.raised = set(raised)

    def check(self, figures: Mapping[str, float | None], step: int) -> list[Alarm]:
        """The new alarms of this update."""
        new = [alarm for alarm in check(figures, self.limits, step) if alarm.name not in self.raised]
        self.raised = {name for name in self.raised if not self._has_recovered(name, figures.get(name))}
        self.raised |= {alarm.name for alarm in new}
        return new

    def reset(self) -> None:
        """Forgets what was raised: after a roll-back the figures are those of another policy."""
        self.raised.clear()

    def is_restorable(self, figures: Mapping[str, float | None]) -> bool:
        """Whether a policy with these figures may be restored: none is near a limit whose action is to roll back.

        A figure that is missing does not count.
        """
        names = [name for name in NAMES if getattr(self.limits, name).action == "roll_back" and name in figures]
        return all(self._has_recovered(name, figures[name]) for name in names)

    def _has_recovered(self, name: str, figure: float | None) -> bool:
        limit = getattr(self.limits, name).limit
        if figure is None:
            return False
        if limit is None:
            return True
        room = RECOVERY * abs(limit)
        stricter = limit + room if name in LOWER_LIMITS else limit - room
        return not _is_beyond(name, figure, stricter)


def _beyond(name: str, figure: float, limits: Limits, step: int) -> Alarm | None:
    limit: Limit = getattr(limits, name)
    if limit.limit is None or not _is_beyond(name, figure, limit.limit):
        return None
    message = _sentence(name, figure, limit.limit)
    return Alarm(name=name, step=step, action=limit.action, message=message, figure=figure, limit=limit.limit)


def _sentence(name: str, figure: float, limit: float) -> str:
    """The message, with enough digits that a figure beyond its limit does not look equal to it."""
    if name == "length_ratio" and figure < 1 < limit:
        limit = 1 / limit
    for extra in range(MOST_EXTRA_DIGITS + 1):
        digits = {"none": extra, "one": extra + 1, "two": extra + 2}
        message, at_limit = (_MESSAGES[name].format(figure=value, **digits) for value in (figure, limit))
        if message != at_limit:
            break
    return f"{message} (limit {limit:g})."


def _is_beyond(name: str, figure: float, limit: float) -> bool:
    if not math.isfinite(figure):
        return True
    if name in LOWER_LIMITS:
        return figure < limit
    if name == "length_ratio":
        return figure <= 0 or max(figure, 1 / figure) > limit
    return figure > limit


# ---- figures


def held_out_gap(rewards: Sequence[float], held_out: Sequence[float]) -> float:
    """How far the reward has risen while the held-out reward has fallen since its best point (Gao et al. 2022).

    rewards, held_out: mean normalised reward of each update's responses, by the reward model that the policy is trained
    against and by the held-out ensemble, without jumps between refits. The best point is the highest moving average
    over five updates of the held-out reward. 0 if the reward has not risen or the held-out reward has not fallen since.
    """
    trained, unseen = _moving_averages(rewards), _moving_averages(held_out)
    if not unseen:
        return 0.0
    best = _argmax(unseen)
    rise, fall = trained[-1] - trained[best], unseen[best] - unseen[-1]
    return rise + fall if rise > 0 and fall > 0 else 0.0


def since_best(rewards: list[float], held_out: list[float]) -> tuple[list[float], list[float]]:
    """Both series from the best point on: `held_out_gap` does not depend on what was before it."""
    unseen = _moving_averages(held_out)
    first = _argmax(unseen) if unseen else 0
    return rewards[first:], held_out[first:]


def repetition(texts: Sequence[str], *, words: int = 3) -> float:
    """The share of a text's word n-grams that repeat an earlier one, 1 − distinct / all; the mean over the texts.

    seq-rep-n of Welleck et al. (2019), with triples because responses are short. A text of fewer words counts 0.
    """
    shares = []
    for text in texts:
        split = text.split()
        grams = [tuple(split[i : i + words]) for i in range(len(split) - words + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def win_rate_gap(predicted: Sequence[float], outcomes: Sequence[float], *, label_noise: float = 0.1) -> float | None:
    """Predicted minus actual win rate: the lower end of the 95 % interval. None below ten pairs.

    predicted: P(the current policy's response is better) for each labelled blind pair; outcomes: 1, ½ or 0. A share
    `label_noise` = e of the labels is random, so that predictions become (1 − e) p + e / 2.
    """
    if len(outcomes) < LEAST_PAIRS:
        return None
    pairs = zip(predicted, outcomes, strict=True)
    gaps = [(1 - label_noise) * p + label_noise / 2 - outcome for p, outcome in pairs]
    return _interval(gaps, [1.0] * len(gaps))[0]


def sign_self_test(scorer: Scorer, preferences: Sequence[Preference]) -> float | None:
    """Mean reward of preferred minus rejected responses: the upper end of the 95 % interval. None below ten pairs.

    Below 0 the sign of the reward is wrong with confidence; the mean of a few pairs may be negative by chance. The
    scorer is called as PPO calls it, so that a sign error between fit and use is found. The mean over members is used;
    a pair counts |2 mu − 1| times its weight, and ties not at all.
    """
    decided = [pair for pair in preferences if pair.mu != 0.5 and pair.weight > 0]
    if len(decided) < LEAST_PAIRS:
        return None
    prompts = [pair.prompt for pair in decided]
    a, b = (scorer.score(prompts, [getattr(pair, side) for pair in decided]).mean(dim=1) for side in ("a", "b"))
    signs = [1.0 if pair.mu > 0.5 else -1.0 for pair in decided]
    advantages = [sign * advantage for sign, advantage in zip(signs, (a - b).tolist(), strict=True)]
    return _interval(advantages, [pair.weight * abs(2 * pair.mu - 1) for pair in decided])[1]


def _interval(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the weighted mean of at least two values, by the normal approximation."""
    total, count = sum(weights), len(values)
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / total
    squares = sum((w * (value - mean)) ** 2 for w, value in zip(weights, values, strict=True))
    margin = Z_95 * math.sqrt(squares * count / (count - 1)) / total
    return mean - margin, mean + margin


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _moving_averages(values: Sequence[float]) -> list[float]:
    """Means of each SMOOTHED successive values; empty if there are fewer."""
    return [sum(values[i - SMOOTHED : i]) / SMOOTHED for i in range(SMOOTHED, len(values) + 1)]

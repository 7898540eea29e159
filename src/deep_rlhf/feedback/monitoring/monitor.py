"""What an update is told about: a row of metrics for the page, and the figures that may raise an alarm."""

from collections.abc import Callable, Sequence
from typing import Any

from deep_rlhf.feedback.monitoring import alarms
from deep_rlhf.feedback.monitoring.forecast import won_by_newer
from deep_rlhf.feedback.questions.candidates import Candidate, rewards_of
from deep_rlhf.feedback.records import Alarm, Label, Row
from deep_rlhf.ops.queries import preferred_probability
from deep_rlhf.types import Preference, Rollout, Scorer

Judge = Callable[[Sequence[str], Sequence[str]], float]  # mean score of answers to prompts, by somebody who knows
SIGN_TEST_PAIRS = 200  # the newest ones


class Monitor:
    """Watches the updates of a run; `state` is what a continuation must know."""

    def __init__(self, limits: alarms.Limits, judge: Judge | None = None) -> None:
        self.watch = alarms.Watch(limits)
        self._judge = judge
        self.figures: dict[str, float] = {}  # of the newest update, where they are known
        self._start: dict[str, float] = {}  # length and entropy of the first update
        self._rewards: list[float] = []  # of each update, as if the reward models had always been the same
        self._watched: list[float] = []
        self._shifts = (0.0, 0.0)  # of the two, from what the reward models say now
        self._newest: tuple[Rollout, float, float] | None = None  # the last answers, and what the two said of them
        self._win_rate_gap: float | None = None

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        series = {"rewards": self._rewards, "watched": self._watched, "shifts": list(self._shifts)}
        return {"raised": sorted(self.watch.raised), "start": self._start, "figures": self.figures, **series}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.watch.raised = set(state["raised"])
        self._start, self.figures = state["start"], state["figures"]
        self._rewards, self._watched = list(state["rewards"]), list(state["watched"])
        self._shifts = (state["shifts"][0], state["shifts"][1])

    def new_reward(self, scorer: Scorer, preferences: Sequence[Preference], step: int) -> list[Alarm]:
        """A reward model is about to be used: the alarms of its sign, tested on the preferences it was fitted to."""
        pairs = [pair for pair in preferences if pair.mu != 0.5][-SIGN_TEST_PAIRS:]
        sign = alarms.sign_self_test(scorer, pairs)
        return alarms.check({"reward_sign": sign}, self.watch.limits, step)  # each one anew

    def link(self, scorer: Scorer, held_out: Scorer | None) -> None:
        """From now on these two say what answers earn. The series go on where they are, else none would ever end high.

        How far another fit is above or below is read off the newest answers, which both fits judge.
        """
        if self._newest is None or held_out is None:
            self._forget()
            return
        rollout, *before = self._newest
        now = [float(one.score(rollout.prompts, rollout.responses).mean()) for one in (scorer, held_out)]
        self._shifts = (self._shifts[0] + before[0] - now[0], self._shifts[1] + before[1] - now[1])
        self._newest = (rollout, now[0], now[1])

    def rolled_back(self, figures: dict[str, float]) -> None:
        """The policy is another one, of these `figures`: what its answers earned before says nothing of it."""
        self._forget()
        self.figures, self._win_rate_gap = figures, None
        self.watch.reset()

    def _forget(self) -> None:
        self._rewards, self._watched, self._shifts, self._newest = [], [], (0.0, 0.0), None

    def compare(self, blind: Sequence[Label], scorer: Scorer, label_noise: float) -> None:
        """People's view of blind pairs against the reward model's."""
        pairs = [(label, won) for label in blind if (won := won_by_newer(label)) is not None]
        if not pairs:
            return
        newer_first = [
            Candidate(one.comparison.prompt, one.comparison.answers[:: 1 if _newer_is_first(one) else -1])
            for one, _ in pairs
        ]
        predicted = preferred_probability(rewards_of(newer_first, scorer)).mean(dim=1).tolist()
        answers = [won for _, won in pairs]
        self._win_rate_gap = alarms.win_rate_gap(predicted, answers, label_noise=label_noise)

    def update(self, metrics: dict[str, float], rollout: Rollout, held_out: Scorer | None) -> tuple[Row, list[Alarm]]:
        """The row of an update for the page, and its new alarms; `metrics` are the trainer's."""
        self._start = self._start or {"length": metrics["response_tokens"], "entropy": metrics["entropy"]}
        row: Row = {
            "reward": metrics["score_mean"],
            "kl": metrics["kl"],
            "sqrt_kl": max(metrics["kl"], 0.0) ** 0.5,
            "entropy": metrics["entropy"],
            "length": metrics["response_tokens"],
            "ensemble_std": metrics["score_member_std"],
            "repetition": alarms.repetition(rollout.responses),
        }
        held_out_gap = None
        if held_out is not None:
            row["held_out_reward"] = float(held_out.score(rollout.prompts, rollout.responses).mean())
            self._rewards.append(row["reward"] + self._shifts[0])
            self._watched.append(row["held_out_reward"] + self._shifts[1])
            self._rewards, self._watched = alarms.since_best(self._rewards, self._watched)
            held_out_gap = alarms.held_out_gap(self._rewards, self._watched)
            self._newest = (rollout, row["reward"], row["held_out_reward"])
        if self._judge is not None:
            row["gold"] = self._judge(rollout.prompts, rollout.responses)
        figures = {
            "held_out_gap": held_out_gap,
            "ensemble_std": row["ensemble_std"],
            "length_ratio": row["length"] / self._start["length"],
            "entropy_ratio": row["entropy"] / self._start["entropy"] if self._start["entropy"] > 0 else None,
            "repetition": row["repetition"],
            "kl": row["kl"],
            "win_rate_gap": self._win_rate_gap,
        }
        self.figures = {name: figure for name, figure in figures.items() if figure is not None}
        return row, self.watch.check(figures, int(metrics["step"]))


def _newer_is_first(label: Label) -> bool:
    first, second = label.comparison.writers
    return first > second

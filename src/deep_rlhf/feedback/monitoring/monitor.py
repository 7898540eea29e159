"""Monitors the updates of a run: a row of metrics for the page, and the figures that may raise alarms."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deep_rlhf.feedback.monitoring import alarms
from deep_rlhf.feedback.monitoring.win_rate import won_by_newer
from deep_rlhf.feedback.questions.candidates import Candidate, rewards_of
from deep_rlhf.feedback.records import Alarm, Label, Row
from deep_rlhf.ops.queries import preferred_probability
from deep_rlhf.types import Preference, Rollout, Scorer

Judge = Callable[[Sequence[str], Sequence[str]], float]  # (prompts, responses) -> mean ground-truth score
SIGN_TEST_PAIRS = 200  # the newest ones


@dataclass(frozen=True, slots=True)
class _Rewarded:
    """The newest responses, with their mean reward and their mean held-out reward."""

    prompts: list[str]
    responses: list[str]
    reward: float
    held_out_reward: float


class Monitor:
    """Computes metrics and alarms from update to update; `state` is what a checkpoint must contain."""

    def __init__(self, limits: alarms.Limits, judge: Judge | None = None) -> None:
        self.tracker = alarms.AlarmTracker(limits)
        self._judge = judge
        self.figures: dict[str, float] = {}  # of the newest update, as far as they are known
        self._start: dict[str, float] = {}  # length and entropy of the first update
        # Mean rewards of each update, shifted so that a change of reward models makes no jump.
        self._rewards: list[float] = []
        self._held_out_rewards: list[float] = []
        self._shifts = (0.0, 0.0)  # of the two series, relative to the current reward models
        self._newest: _Rewarded | None = None
        self._win_rate_gap: float | None = None

    @property
    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "raised": sorted(self.tracker.raised),
            "start": self._start,
            "figures": self.figures,
            "rewards": self._rewards,
            "held_out_rewards": self._held_out_rewards,
            "shifts": list(self._shifts),
            "newest": asdict(self._newest) if self._newest else None,
            "win_rate_gap": self._win_rate_gap,
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.tracker.raised = set(state["raised"])
        self._start, self.figures = state["start"], state["figures"]
        self._rewards, self._held_out_rewards = list(state["rewards"]), list(state["held_out_rewards"])
        self._shifts = (state["shifts"][0], state["shifts"][1])
        newest = state.get("newest")  # missing in checkpoints of earlier versions
        self._newest = _Rewarded(**newest) if newest else None
        self._win_rate_gap = state.get("win_rate_gap")

    def check_sign(self, scorer: Scorer, preferences: Sequence[Preference], step: int) -> list[Alarm]:
        """The alarms of a new reward model whose sign is wrong on the preferences that it was fitted to."""
        pairs = [pair for pair in preferences if pair.mu != 0.5][-SIGN_TEST_PAIRS:]
        sign = alarms.sign_self_test(scorer, pairs)
        return alarms.check({"reward_sign": sign}, self.tracker.limits, step)  # raised again for each reward model

    def replace_rewards(self, scorer: Scorer, held_out: Scorer | None) -> None:
        """Continues both reward series with new reward models, without a jump from one fit to the next.

        The shift is the difference between the new and the old models' mean reward of the newest responses.
        """
        if self._newest is None or held_out is None:
            self._clear_series()
            return
        before = self._newest
        means = [float(one.score(before.prompts, before.responses).mean()) for one in (scorer, held_out)]
        now = replace(before, reward=means[0], held_out_reward=means[1])
        self._shifts = (
            self._shifts[0] + before.reward - now.reward,
            self._shifts[1] + before.held_out_reward - now.held_out_reward,
        )
        self._newest = now

    def rolled_back(self, figures: dict[str, float]) -> None:
        """Drops everything about the discarded policy; `figures` are those of the restored one."""
        self._clear_series()
        self.figures, self._win_rate_gap = figures, None
        self.tracker.reset()

    def _clear_series(self) -> None:
        self._rewards, self._held_out_rewards, self._shifts, self._newest = [], [], (0.0, 0.0), None

    def compare_win_rates(self, blind: Sequence[Label], scorer: Scorer, label_noise: float) -> None:
        """Compares people's win rate on blind pairs with the one that the reward model predicts."""
        pairs = [(label, won) for label in blind if (won := won_by_newer(label)) is not None]
        if not pairs:
            return
        newer_first = [
            Candidate(one.comparison.prompt, one.comparison.responses[:: 1 if _newer_is_first(one) else -1])
            for one, _ in pairs
        ]
        predicted = preferred_probability(rewards_of(newer_first, scorer)).mean(dim=1).tolist()
        self._win_rate_gap = alarms.win_rate_gap(predicted, [won for _, won in pairs], label_noise=label_noise)

    def update(self, metrics: dict[str, float], rollout: Rollout, held_out: Scorer | None) -> tuple[Row, list[Alarm]]:
        """The metrics of an update for the page, and its new alarms. `metrics` are the trainer's."""
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
            rewards = [*self._rewards, row["reward"] + self._shifts[0]]
            held_out_rewards = [*self._held_out_rewards, row["held_out_reward"] + self._shifts[1]]
            self._rewards, self._held_out_rewards = alarms.since_best(rewards, held_out_rewards)
            held_out_gap = alarms.held_out_gap(self._rewards, self._held_out_rewards)
            texts = list(rollout.prompts), list(rollout.responses)
            self._newest = _Rewarded(*texts, row["reward"], row["held_out_reward"])
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
        return row, self.tracker.check(figures, int(metrics["step"]))


def _newer_is_first(label: Label) -> bool:
    first, second = label.comparison.writers
    return first > second

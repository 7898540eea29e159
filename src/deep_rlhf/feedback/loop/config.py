"""The settings of a training loop with people in it, shared by `deep-rlhf loop` and `deep-rlhf teach`."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from deep_rlhf.errors import ConfigError
from deep_rlhf.feedback.monitoring.alarms import Limits
from deep_rlhf.feedback.records import MOST_RESPONSES, AcquisitionRule
from deep_rlhf.settings import check_settings, seed_setting, setting

# Settings that a run keeps, since rewards, versions and questions of before would mean something else; the others may
# change when it is continued. `initial_labels` is kept from the first reward model on.
KEPT_SETTINGS = (
    "seed",
    "members",
    "held_out_members",
    "template",
    "max_new_tokens",
    "max_prompt_length",
    "fixed_prompts",
)
SMALL_POLICY = 10_000_000  # weights up to which a policy gets the learning rates of the demo's


@dataclass(frozen=True)
class SessionConfig:
    """Settings of the questions, the reward model, PPO and the loop itself.

    Raises ConfigError for a value out of bounds and for settings that contradict each other.
    """

    seed: int = seed_setting(1, "seed of all random numbers")
    updates: int = setting(100_000, "policy updates before the loop ends", least=1)

    initial_labels: int = setting(20, "labels about the start policy before the first reward model is fitted", least=1)
    labels: int | None = setting(
        None, "total label budget, spent at a decaying rate; default: every label that people give"
    )
    label_decay: float = setting(50.0, "with --labels: updates after which the label rate has halved", above=0)
    questions_ahead: int = setting(
        16, "questions that wait for people, at least three per active person", least=1, most=10_000
    )
    choose_by: AcquisitionRule = setting(
        "variance", "acquisition rule: random, ensemble variance, or expected information gain"
    )
    random_share: float = setting(0.2, "share of questions always selected at random (control arm)", least=0, most=1)
    samples_per_prompt: int = setting(
        5,
        "responses sampled per prompt; their pairs are the candidates for a question (5 make 10 pairs)",
        least=2,
        most=1024,
    )
    ranked_responses: int = setting(
        2, f"responses per question: 2 to compare, 3 to {MOST_RESPONSES} to rank", least=2, most=MOST_RESPONSES
    )
    win_rate_share: float = setting(
        0.06, "share of questions that compare the policy with the start policy, blindly", least=0, most=1
    )
    repeat_share: float = setting(0.03, "share of questions that repeat an earlier one", least=0, most=1)
    overlap_share: float = setting(0.1, "share of questions that two people label, if two are active", least=0, most=1)
    gold_questions: str | None = setting(None, "file of questions with a known answer: prompt, a, b and expected")
    gold_share: float = setting(0.03, "share of questions taken from --gold_questions", least=0, most=1)

    members: int = setting(4, "size of the reward-model ensemble", least=2, most=1024)
    label_noise: float = setting(0.1, "lower bound of the share of labels assumed to be random", least=0, below=1)
    refit_after: int = setting(8, "minimum new labels before a refit of the reward model", least=1)
    refit_growth: float = setting(0.1, "minimum new labels before a refit, as a share of all labels", least=0)
    reward_learning_rate: float | None = setting(
        None, "learning rate of the reward model; default: 5e-4 for a small policy, otherwise 1e-5", above=0, most=1e3
    )
    reward_batch_size: int = setting(16, "pairs per optimiser step of the reward model", least=1, most=2**20)
    held_out_members: int = setting(
        2, "size of a held-out ensemble, used only to detect over-optimisation; 0 for none", least=0, most=1024
    )
    template: Literal["hh", "plain"] = setting("hh", "how prompts and dialogues become text")

    batch_size: int = setting(64, "responses per policy update", least=1, most=2**20)
    mini_batch_size: int = setting(16, "responses per optimiser step", least=1)
    ppo_epochs: int = setting(2, "optimisation epochs per batch of responses", least=1)
    learning_rate: float | None = setting(
        None,
        "learning rate of the policy; default: 3e-4 for a small one (10 million weights), otherwise 1e-5",
        above=0,
        most=1e3,
    )
    init_kl_coef: float = setting(0.1, "coefficient of the KL penalty against the start policy", least=0)
    max_new_tokens: int = setting(64, "longest response, in tokens", least=1, most=2**20)
    max_prompt_length: int = setting(512, "longest prompt, in tokens; longer ones are left out", least=1)
    temperature: float = setting(1.0, "sampling temperature, in sampling and in training", above=1e-4, most=1e4)

    version_every: int = setting(10, "policy updates between versions, in addition to one per refit", least=1)
    save_every: int = setting(5, "policy updates between checkpoints", least=1)
    fixed_prompts: int = setting(6, "prompts that every version responds to, shown on the page", least=0)
    alarms: list[str] = setting([], "limits and actions, as in kl=20:stop repetition=off length_ratio=3:roll_back")
    mode: Literal["async", "batched"] = setting(
        "async", "async: labelling, refits and updates run at the same time; batched: in turn, reproducible"
    )
    batched_updates: int = setting(4, "with --mode=batched: policy updates between two refits", least=1)
    pace: float = setting(3.0, "seconds per label of simulated and replayed annotators", least=0, below=3600)
    threads: int | None = setting(
        None,
        "threads of the policy's process and of the refits' process; default: half of the cores each",
        least=1,
        most=1024,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.win_rate_share + self.repeat_share + (self.gold_share if self.gold_questions else 0.0) > 0.5:
            raise ConfigError("win_rate_share, repeat_share and gold_share leave too few labels: at most 0.5 in all.")
        if self.held_out_members == 1:
            raise ConfigError("held_out_members must be 0 (none) or at least 2, not 1.")
        if self.samples_per_prompt < self.ranked_responses:
            raise ConfigError(
                f"samples_per_prompt={self.samples_per_prompt} is less than the responses per question"
                f" (ranked_responses={self.ranked_responses}): raise it."
            )
        if self.labels is not None and self.labels < self.initial_labels:
            raise ConfigError(f"labels={self.labels} is less than initial_labels={self.initial_labels}: raise it.")
        if self.labels is None and self.mode == "batched":
            raise ConfigError("mode=batched needs labels, the total label budget.")
        if self.mini_batch_size > self.batch_size:
            raise ConfigError(f"mini_batch_size={self.mini_batch_size} is more than batch_size={self.batch_size}.")
        Limits.read(self.alarms)

    def learning_rates(self, weights: int) -> tuple[float, float]:
        """The learning rates of the policy and of the reward model, for a policy with this number of weights."""
        policy, reward = (3e-4, 5e-4) if weights <= SMALL_POLICY else (1e-5, 1e-5)
        return self.learning_rate or policy, self.reward_learning_rate or reward

    def kept_settings(self, *, has_reward_model: bool) -> dict[str, Any]:
        """The settings that a run that is continued must have kept."""
        names = (*KEPT_SETTINGS, "initial_labels") if has_reward_model else KEPT_SETTINGS
        return {name: getattr(self, name) for name in names}

    @property
    def threads_each(self) -> int:
        """Threads of each of the two processes that compute."""
        return self.threads or max(1, (os.cpu_count() or 1) // 2)

    @property
    def limits(self) -> Limits:
        """The alarms' limits and actions."""
        return Limits.read(self.alarms)

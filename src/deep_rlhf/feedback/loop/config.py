"""The settings of a loop with people in it, shared by `deep-rlhf loop` and `deep-rlhf teach`."""

import math
from dataclasses import dataclass, field

from deep_rlhf.data.chat import get_template
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.monitoring.alarms import Limits
from deep_rlhf.feedback.records import WAYS, Way
from deep_rlhf.types import check_seed

MODES = ("async", "batched")
SMALL = 10_000_000  # weights of a policy that learns as fast as the demo's


@dataclass(frozen=True)
class SessionConfig:
    """How people are asked, when the reward model is fitted again, and how the policy learns in between.

    Raises UserError for a value out of range.
    """

    seed: int = field(default=1, metadata={"help": "seed of everything that is drawn"})
    updates: int = field(default=100_000, metadata={"help": "updates of the policy, after which the loop ends"})

    initial_labels: int = field(
        default=20, metadata={"help": "answers about the start policy that the first reward model waits for"}
    )
    labels: int | None = field(
        default=None,
        metadata={
            "help": "answers wanted by the last update, fewer and fewer per update; default: all that people give"
        },
    )
    label_decay: float = field(
        default=50.0, metadata={"help": "with --labels: updates after which they are asked for half as often"}
    )
    questions_ahead: int = field(default=16, metadata={"help": "questions that wait for people, or three for each"})
    choose_by: Way = field(
        default="variance",
        metadata={"help": "random, variance of the ensemble, or information gain, of many candidate pairs"},
    )
    random_share: float = field(
        default=0.2, metadata={"help": "share of the questions that is drawn at random for good"}
    )
    samples_per_prompt: int = field(
        default=5, metadata={"help": "answers to a prompt, whose pairs are the candidates of a question: 5 make 10"}
    )
    ranked_answers: int = field(
        default=2, metadata={"help": "answers in a question: 2 are compared, 3 to 9 put in order"}
    )
    win_rate_share: float = field(
        default=0.06, metadata={"help": "share of questions that compare the policy with the start, blindly"}
    )
    repeat_share: float = field(default=0.03, metadata={"help": "share of questions that repeat an earlier one"})
    overlap_share: float = field(
        default=0.1, metadata={"help": "share of questions that two people answer, if there are"}
    )
    gold_questions: str | None = field(
        default=None, metadata={"help": "a file of questions whose answer is known: prompt, a, b and expected"}
    )
    gold_share: float = field(
        default=0.03, metadata={"help": "share of questions that are taken from --gold_questions"}
    )

    members: int = field(default=4, metadata={"help": "of the reward-model ensemble"})
    label_noise: float = field(default=0.1, metadata={"help": "share of answers assumed to be random, at least"})
    refit_after: int = field(default=8, metadata={"help": "new answers that make a refit of the reward model due …"})
    refit_growth: float = field(default=0.1, metadata={"help": "… or this share of all, whichever is more"})
    reward_learning_rate: float | None = field(
        default=None, metadata={"help": "of the reward model; default: 5e-4 for a small policy, 1e-5 for others"}
    )
    reward_batch_size: int = field(default=16, metadata={"help": "pairs per step of the reward model"})
    held_out_members: int = field(
        default=2,
        metadata={"help": "size of a held-out ensemble, used only to detect over-optimisation; 0 for none"},
    )
    template: str = field(default="hh", metadata={"help": "how prompts and dialogues are written: hh or plain"})

    batch_size: int = field(default=64, metadata={"help": "responses per update"})
    mini_batch_size: int = field(default=16, metadata={"help": "responses per optimiser step"})
    ppo_epochs: int = field(default=2, metadata={"help": "passes over each batch"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "of the policy; default: 3e-4 for a small one (10 million weights), or 1e-5"}
    )
    init_kl_coef: float = field(default=0.1, metadata={"help": "how hard the policy is held near the start"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response, in tokens"})
    max_prompt_length: int = field(default=512, metadata={"help": "prompts with more tokens are left out"})
    temperature: float = field(default=1.0, metadata={"help": "divides the logits, in sampling and in training"})

    version_every: int = field(
        default=10, metadata={"help": "updates between versions of the policy, beside those of refits"}
    )
    save_every: int = field(default=5, metadata={"help": "updates between checkpoints"})
    fixed_prompts: int = field(default=6, metadata={"help": "prompts that every version answers, for the page"})
    alarms: list[str] = field(
        default_factory=list,
        metadata={"help": "limits and actions, as in kl=20:stop repetition=off length_ratio=3:roll_back"},
    )
    mode: str = field(
        default="async",
        metadata={"help": "async: nothing waits on anybody; batched: labels, refit, updates in turn, repeatable"},
    )
    batched_updates: int = field(default=4, metadata={"help": "with --mode=batched: updates between two refits"})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.choose_by not in WAYS:
            raise UserError(f"choose_by must be one of {', '.join(WAYS)}, not {self.choose_by}.")
        if self.mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, not {self.mode}.")
        for name in ("random_share", "win_rate_share", "repeat_share", "overlap_share", "gold_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a share, from 0 to 1, not {getattr(self, name)}.")
        if not 0 <= self.label_noise < 1:
            raise UserError(f"label_noise is a share below 1, not {self.label_noise}.")
        if self.win_rate_share + self.repeat_share + (self.gold_share if self.gold_questions else 0.0) > 0.5:
            raise UserError("win_rate_share, repeat_share and gold_share leave too few labels: at most 0.5 in all.")
        for name in (
            *("updates", "initial_labels", "questions_ahead", "refit_after", "batch_size", "mini_batch_size"),
            *("ppo_epochs", "max_new_tokens", "max_prompt_length", "version_every", "save_every", "batched_updates"),
            "reward_batch_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("label_decay", "reward_learning_rate", "learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a number above 0, not {value}.")
        for name in ("fixed_prompts", "refit_growth", "init_kl_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        if self.held_out_members == 1 or self.held_out_members < 0 or self.members < 2:
            raise UserError("An ensemble has at least 2 members; held_out_members=0 is for none.")
        get_template(self.template)
        if not 2 <= self.ranked_answers <= 9:
            raise UserError(f"ranked_answers must be 2 to 9, not {self.ranked_answers}.")
        if self.samples_per_prompt < self.ranked_answers:
            raise UserError(
                f"samples_per_prompt={self.samples_per_prompt} gives fewer answers than a question shows"
                f" ({self.ranked_answers}): raise it."
            )
        if self.labels is not None and self.labels < self.initial_labels:
            raise UserError(f"labels={self.labels} is less than initial_labels={self.initial_labels}: raise it.")
        if self.labels is None and self.mode == "batched":
            raise UserError("mode=batched needs labels, the number of answers wanted in all.")
        if self.mini_batch_size > self.batch_size:
            raise UserError(f"mini_batch_size={self.mini_batch_size} is more than batch_size={self.batch_size}.")
        Limits.read(self.alarms)

    def learning_rates(self, weights: int) -> tuple[float, float]:
        """Of the policy and of the reward model, for a policy of so many weights."""
        policy, reward = (3e-4, 5e-4) if weights <= SMALL else (1e-5, 1e-5)
        return self.learning_rate or policy, self.reward_learning_rate or reward

    @property
    def limits(self) -> Limits:
        """Of the alarms."""
        return Limits.read(self.alarms)

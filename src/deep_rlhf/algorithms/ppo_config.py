"""The settings of a PPO run, named as in TRL ≤ 0.11, so that old configurations still mean the same."""

from dataclasses import dataclass, field

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import UserError
from deep_rlhf.types import CriticKind


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """What PPO adds to the settings of every online algorithm. Raises UserError for values that cannot work."""

    mini_batch_size: int | None = field(
        default=None, metadata={"help": "responses per backward pass; default: batch_size"}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "backward passes of mini_batch_size responses per optimiser step"}
    )
    ppo_epochs: int = field(default=4, metadata={"help": "passes over each batch"})
    early_stopping: bool = field(
        default=False, metadata={"help": "no further pass once the policy moved by 1.5 times target_kl"}
    )
    target_kl: float = field(default=1.0, metadata={"help": "KL from the sampling policy, for early_stopping"})
    ratio_threshold: float = field(
        default=10.0, metadata={"help": "minibatches whose mean policy ratio is larger are left out"}
    )
    gamma: float = field(default=1.0, metadata={"help": "discount"})
    lam: float = field(default=0.95, metadata={"help": "lambda of generalised advantage estimation"})
    cliprange: float = field(default=0.2, metadata={"help": "range of the policy ratio, 1 ± this"})
    dual_clip: float | None = field(
        default=None, metadata={"help": "bound on the ratio where the advantage is negative; 3 in Ye et al. 2020"}
    )
    cliprange_value: float = field(default=0.2, metadata={"help": "range of the value's change"})
    vf_coef: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus"})
    whiten_rewards: bool = field(default=False, metadata={"help": "scale rewards to unit variance before GAE"})
    critic: CriticKind = field(
        default="shared",
        metadata={"help": "a head on the policy's trunk, a trunk of its own, or one that starts as the reward model"},
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "first updates, in which only the critic learns"})
    importance_cap: float | None = field(
        default=None, metadata={"help": "largest weight that corrects for a sampler unlike the trainer; 2 is common"}
    )

    @property
    def optimizer_batch_size(self) -> int:
        """Responses per optimiser step."""
        return (self.mini_batch_size or self.batch_size) * self.gradient_accumulation_steps

    @property
    def recomputes_logprobs(self) -> bool:
        """Only a correction for a sampler unlike the trainer tells the two apart."""
        return self.importance_cap is not None

    def adapts_kl_coef(self, update: int) -> bool:
        """Not while only the critic learns: the KL is then 0 whatever its coefficient."""
        return super().adapts_kl_coef(update) and update >= self.critic_warmup_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("ppo_epochs", "cliprange", "cliprange_value", "target_kl", above=0)
        self.check_range("mini_batch_size", "gradient_accumulation_steps", least=1)
        self.check_range("vf_coef", "entropy_coef", "critic_warmup_steps", least=0)
        self.check_range("ratio_threshold", "dual_clip", above=1)
        self.check_range("importance_cap", least=1)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if self.optimizer_batch_size > self.batch_size:
            raise UserError(
                f"mini_batch_size × gradient_accumulation_steps is {self.optimizer_batch_size}, more than the"
                f" batch_size={self.batch_size} that one update has: lower one of them."
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.cliprange:
            raise UserError(
                f"dual_clip={self.dual_clip} must be larger than 1 + cliprange, or it leaves nothing to cliprange."
            )

"""What algorithms without a critic share beside the loop of `online`: settings, and an optimiser of the policy."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.optimiser_step import Optimisation, minibatches
from deep_rlhf.errors import UserError
from deep_rlhf.models.policy import Policy
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.types import Experience


@dataclass(frozen=True)
class CriticFreeConfig(OnlineConfig):
    """Epochs, minibatches and clipping. Raises UserError for values that cannot work."""

    adap_kl_ctrl: bool = field(default=False, metadata={"help": "adapt the KL coefficient towards `target`"})
    num_iterations: int = field(default=1, metadata={"help": "passes over each batch"})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "responses per optimiser step; default: batch_size"}
    )
    cliprange: float = field(default=0.2, metadata={"help": "range of the policy ratio, 1 ± this"})

    @property
    def optimizer_batch_size(self) -> int:
        """Responses per optimiser step."""
        return self.mini_batch_size or self.batch_size

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("cliprange", above=0)
        self.check_range("num_iterations", "mini_batch_size", least=1)
        if self.mini_batch_size is not None and self.mini_batch_size > self.batch_size:
            raise UserError(
                f"mini_batch_size={self.mini_batch_size} is more than the batch_size={self.batch_size} that one update"
                " has: lower it."
            )

    def check_kl_in_reward(self) -> None:
        """Raises UserError if the KL is asked to be part of a loss that has no place for it."""
        if self.kl_in_loss:
            raise UserError("kl_in_loss is for PPO and GRPO: this algorithm has its KL in the reward, so leave it out.")


class CriticFreeLearner:
    """An optimiser of the policy alone; `learn` is each algorithm's own."""

    critic = None

    def __init__(self, config: CriticFreeConfig, policy: Policy, runtime: Runtime, *, updates: int, **_: Any) -> None:
        """The scorer and the tokenizer that a critic would need are given, too, and not looked at."""
        self.config = config
        self.policy = policy
        self.runtime = runtime
        self.optimisation = Optimisation(
            policy.trainable_parameters(),
            policy,
            None,
            config,
            runtime,
            updates=updates,
            max_rows=config.forward_batch_size,
        )

    def minibatches(self, update: int) -> Iterator[Tensor]:
        """The samples of each optimiser step of an update: in every pass another permutation."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 104_729 + update)
        for _ in range(config.num_iterations):
            yield from minibatches(generator, config.batch_size, config.optimizer_batch_size, self.runtime.device)

    def logprobs(self, part: Experience) -> Tensor:
        """The policy's log-probability [n, R] of each response token, with gradient; 0 outside the mask."""
        states = self.policy.states(part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
        return self.policy.logprobs(states, part.response_ids, part.response_mask, self.config.temperature)

    def state(self) -> dict[str, Any]:
        return {"optimisation": self.optimisation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimisation.load_state(state["optimisation"])

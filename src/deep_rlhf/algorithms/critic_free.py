"""The settings and the optimiser shared by the algorithms without a critic: RLOO, GRPO, REINFORCE++."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.optimiser_step import Optimisation, minibatches
from deep_rlhf.errors import ConfigError
from deep_rlhf.models.policy import Policy
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.settings import setting
from deep_rlhf.types import Experience


@dataclass(frozen=True)
class CriticFreeConfig(OnlineConfig):
    """Epochs, minibatches and clipping. Raises ConfigError for settings that cannot work."""

    adap_kl_ctrl: bool = setting(False, "adapt the KL coefficient so that the KL approaches target")
    ppo_epochs: int = setting(1, "passes over each batch", least=1)
    mini_batch_size: int | None = setting(
        None, "responses per minibatch, one optimiser step each; default: batch_size", least=1
    )
    cliprange: float = setting(0.2, "clip range ε of the policy ratio: 1 ± ε", above=0)

    @property
    def optimizer_batch_size(self) -> int:
        """Responses per optimiser step."""
        return self.mini_batch_size or self.batch_size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mini_batch_size is not None and self.mini_batch_size > self.batch_size:
            raise ConfigError(
                f"mini_batch_size={self.mini_batch_size} is more than the batch_size={self.batch_size} of one update:"
                " lower it."
            )

    def check_kl_in_reward(self) -> None:
        """Raises ConfigError if kl_in_loss is set for an algorithm whose loss has no KL term."""
        if self.kl_in_loss:
            raise ConfigError(
                "kl_in_loss is for PPO and GRPO: this algorithm has its KL in the reward, so leave it out."
            )


class CriticFreeLearner:
    """An optimiser of the policy; each algorithm adds its own `learn`."""

    critic = None

    def __init__(self, config: CriticFreeConfig, policy: Policy, runtime: Runtime, *, updates: int, **_: Any) -> None:
        """Ignores the scorer and the tokenizer, which only a critic needs."""
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
        """The samples of each optimiser step of an update; every pass is a new permutation."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 104_729 + update)
        for _ in range(config.ppo_epochs):
            yield from minibatches(generator, config.batch_size, config.optimizer_batch_size, self.runtime.device)

    def logprobs(self, part: Experience) -> Tensor:
        """The policy's log-probability [n, R] of each response token, with gradient; 0 outside the mask."""
        states = self.policy.states(part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
        return self.policy.logprobs(states, part.response_ids, part.response_mask, self.config.temperature)

    def state(self) -> dict[str, Any]:
        """The state of the optimiser."""
        return {"optimisation": self.optimisation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.optimisation.load_state(state["optimisation"])

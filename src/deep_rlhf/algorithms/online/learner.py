"""The interface of an algorithm."""

from typing import Any, Protocol

from deep_rlhf.models.critic import Critic
from deep_rlhf.types import Rollout


class Learner(Protocol):
    """An algorithm: changes the policy so that responses like those of a rollout get higher rewards."""

    @property
    def critic(self) -> Critic | None:
        """The critic whose values a rollout holds; None for an algorithm without one."""
        ...

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """Makes one update from a rollout of all processes and returns its metrics.

        Raises NotFiniteError at the first loss or gradient that is not finite, before it reaches a weight.
        """
        ...

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint needs beside the policy's weights."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        ...

"""Trust region policy optimisation of a language model against a reward on text (Schulman et al. 2015).

Christiano et al. 2017 use it for simulated robotics. One update: advantages as in PPO; the direction F⁻¹g by conjugate
gradient, where g is the gradient of the surrogate and F the Fisher matrix of the policy; the longest step along it
whose quadratic KL is at most `max_kl`; and a line search that halves the step until the surrogate improves and the KL
is within bounds. If no step is acceptable, the old parameters are restored. Where this departs from the paper:
- advantages come from a critic (GAE, Schulman et al. 2016), a separate model, so fitting it does not move the policy;
- surrogate and KL are means over the real tokens of all responses, so `max_kl` is in nats per token;
- F v is computed on all tokens of the batch (the paper uses a tenth of them), by differentiating the KL twice;
- `lr_scheduler_type` also shrinks the trust region: otherwise the last steps would be as long as the first.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.optimiser_step import Optimisation
from deep_rlhf.algorithms.online.state import load_tensors, trainable_tensors
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import ConfigError, NotFiniteError
from deep_rlhf.models.critic import make_critic
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.advantages import gae, token_rewards
from deep_rlhf.ops.kl import kl_full
from deep_rlhf.ops.logprobs import chunked_kl_full
from deep_rlhf.ops.losses import explained_variance, policy_loss, value_loss
from deep_rlhf.ops.masked import masked_mean, masked_sum, whiten
from deep_rlhf.ops.trust_region import backtracking, conjugate_gradient
from deep_rlhf.rollout.passes import ForwardPasses
from deep_rlhf.rollout.records import experience_from, select
from deep_rlhf.runtime.precision import Precision
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.settings import setting
from deep_rlhf.types import Experience, Rollout, Scorer

T = TypeVar("T")

CG_TOLERANCE = 1e-5  # residual relative to the target; float32 is not more precise

twice_differentiable = sdpa_kernel(SDPBackend.MATH)  # fused attention kernels have no second derivative


@dataclass(frozen=True)
class TRPOConfig(OnlineConfig):
    """The settings of TRPO. Raises ConfigError for settings that cannot work."""

    exp_name: str = setting("trpo", "name of the run")
    precision: Precision = setting(
        "fp32", "dtype of the trained models; only fp32: bf16 is too coarse for products with the Fisher matrix"
    )
    learning_rate: float = setting(1.41e-5, "initial learning rate of AdamW for the critic", above=0, most=1e3)
    max_kl: float = setting(
        0.01,
        "upper limit of the KL between the policies before and after an update, in nats per token; falls with the"
        " square of the learning rate",
        above=0,
    )
    cg_iterations: int = setting(10, "products with the Fisher matrix per update (conjugate gradient)", least=1)
    cg_damping: float = setting(0.1, "number added to the diagonal of the Fisher matrix", least=0)
    line_search_steps: int = setting(
        10, "largest number of steps tried per update, each half as long", least=1, most=1000
    )
    value_epochs: int = setting(5, "optimiser steps of the critic per update, each on the whole batch", least=1)
    gamma: float = setting(1.0, "discount factor γ per token", least=0, most=1)
    lam: float = setting(0.95, "λ of generalised advantage estimation", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision != "fp32":
            raise ConfigError(
                f"precision={self.precision} is too coarse for the products with TRPO's Fisher matrix: use fp32."
            )
        if self.kl_in_loss:
            raise ConfigError("kl_in_loss is for PPO and GRPO: TRPO has its KL in the reward, so leave it out.")


class TRPO:
    """The learner of TRPO: one update from a rollout."""

    def __init__(
        self,
        config: TRPOConfig,
        policy: Policy,
        runtime: Runtime,
        *,
        updates: int,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config = config
        self.policy = policy
        self.runtime = runtime
        self.parameters = policy.trainable_parameters()
        self.critic = make_critic("separate", policy, scorer, tokenizer)
        if config.gradient_checkpointing and self.critic.own_trunk is not None:
            self.critic.own_trunk.checkpoint_activations()
        self.optimisation = Optimisation(
            self.critic.trainable_parameters(),
            policy,
            self.critic,
            config,
            runtime,
            updates=updates,
            max_rows=config.forward_batch_size,
        )
        self._forward_passes = ForwardPasses(policy, training=False, max_rows=config.forward_batch_size)
        self._training_passes = ForwardPasses(policy, training=True, max_rows=config.forward_batch_size)
        frozen = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
        self._old = copy.deepcopy(policy, frozen)  # shares the frozen weights
        self._old_parameters = self._old.trainable_parameters()
        self._old.requires_grad_(False)

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """Makes one update: advantages, a step of the policy within the trust region, then steps of the critic."""
        experience = self.experience(rollout, kl_coef)
        mask = experience.response_mask
        metrics = {
            "learning_rate": self.optimisation.learning_rate,
            "value_mean": float(masked_mean(experience.values, mask)),
            "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
            **self._improve_policy(experience),
            "value_loss": self._fit_critic(experience),
        }
        self.optimisation.schedule.step()
        return metrics

    def experience(self, rollout: Rollout, kl_coef: float) -> Experience:
        """Computes rewards, advantages and returns of a rollout, [N, R]."""
        config, mask = self.config, rollout.response_mask
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, kl_coef)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        return experience_from(rollout, rewards=rewards, advantages=whiten(advantages, mask), returns=returns)

    def _improve_policy(self, experience: Experience) -> dict[str, float]:
        """Makes the longest acceptable step along F⁻¹g, or none (eq. 14 and appendix C). Raises NotFiniteError."""
        config = self.config
        _copy_values(self.parameters, self._old_parameters)
        max_kl = config.max_kl * (self.optimisation.learning_rate / config.learning_rate) ** 2  # length ∝ √max_kl
        old_loss, gradient = self._loss_and_gradient(experience)
        if not torch.isfinite(gradient).all():
            raise NotFiniteError("the gradient of the policy is not finite")

        fisher = self.fisher(experience)

        def product(vector: Tensor) -> Tensor:
            return fisher(vector) + config.cg_damping * vector

        direction = conjugate_gradient(product, -gradient, iterations=config.cg_iterations, tolerance=CG_TOLERANCE)
        curvature = float(direction @ product(direction))
        if not math.isfinite(curvature):
            raise NotFiniteError(f"the curvature along the policy's step is {curvature}")
        step = direction * math.sqrt(2 * max_kl / curvature) if curvature > 0 else torch.zeros_like(direction)
        start, after = _vector(self._old_parameters), (old_loss, 0.0)

        def evaluate(fraction: float) -> tuple[float, float]:
            nonlocal after
            _copy_values(self._as_parameters(start + fraction * step), self.parameters)
            after = self._loss_and_kl(experience)
            return old_loss - after[0], after[1]

        fraction = backtracking(evaluate, max_kl=max_kl, attempts=config.line_search_steps)
        if fraction == 0:
            _copy_values(self._old_parameters, self.parameters)
            after = (old_loss, 0.0)
        return {
            "policy_loss": after[0],
            "approx_kl": after[1],
            "max_kl": max_kl,
            "grad_norm": float(gradient.norm()),
            "step_fraction": fraction,
        }

    def fisher(self, experience: Experience) -> Callable[[Tensor], Tensor]:
        """Returns the function v [D] -> F v [D], for all trainable weights as one vector.

        F is the Hessian of the mean KL per token from the present policy, whose gradient is 0 at its own weights, so
        this Hessian is the Fisher matrix. Memory is that of one pass with gradients. A batch that fits in one pass is
        passed once for all products.
        """
        tokens = experience.response_mask.sum()
        kept: list[Sequence[Tensor]] = []

        @twice_differentiable
        def product(vector: Tensor) -> Tensor:
            directions = self._as_parameters(vector)

            def run_passes(parts: list[Tensor]) -> Tensor:
                if len(parts) > 1:
                    kept.clear()
                result = torch.zeros_like(vector)
                for rows in parts:
                    slopes = kept[0] if kept else self._kl_slopes(select(experience, rows))
                    if len(parts) == 1:
                        kept[:] = [slopes]
                    along = torch.stack([(a * b).sum() for a, b in zip(slopes, directions, strict=True)]).sum()
                    result += _vector(self._gradient(along, retain_graph=bool(kept)))
                return result

            return self.runtime.sum(self._in_passes(experience, run_passes)) / tokens

        return product

    @twice_differentiable
    def _kl_slopes(self, part: Experience) -> Sequence[Tensor]:
        """The gradient of KL(present ‖ weights), summed over the tokens of `part`, as a function of the weights."""
        states = _states(self.policy, part)[part.response_mask]
        logprobs = (self.policy.head(states).float() / self.config.temperature).log_softmax(-1)
        return self._gradient(kl_full(logprobs.detach(), logprobs).sum(), create_graph=True)

    def _gradient(self, output: Tensor, *, retain_graph: bool = False, create_graph: bool = False) -> Sequence[Tensor]:
        """The gradient of a scalar in the trainable weights; zeros for a weight that does not affect it."""
        return torch.autograd.grad(
            output,
            self.parameters,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            materialize_grads=True,
        )

    def _loss_and_gradient(self, experience: Experience) -> tuple[float, Tensor]:
        """The surrogate loss per token, and its gradient [D] as one vector."""

        def run_passes(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
            gradient = torch.zeros_like(_vector(self._old_parameters))
            total = torch.zeros((), device=gradient.device)
            for rows in parts:
                part = select(experience, rows)
                loss = self._surrogate_loss(part, _states(self.policy, part))
                gradient += _vector(self._gradient(loss))
                total += loss.detach()
            return total, gradient

        total, gradient = self._in_passes(experience, run_passes)
        tokens = experience.response_mask.sum()
        return float(self.runtime.sum(total) / tokens), self.runtime.sum(gradient) / tokens

    @torch.no_grad()
    def _loss_and_kl(self, experience: Experience) -> tuple[float, float]:
        """The surrogate loss per token of the present policy, and the exact KL(old ‖ present) per token in nats."""

        def run_passes(parts: list[Tensor]) -> Tensor:
            sums = torch.zeros(2, device=experience.scores.device)
            for rows in parts:
                part = select(experience, rows)
                mask, states = part.response_mask, _states(self.policy, part)
                kl = chunked_kl_full(
                    _states(self._old, part)[mask],
                    self._old.head,
                    states[mask],
                    self.policy.head,
                    temperature=self.config.temperature,
                    chunk_size=self.policy.chunk_size,
                )
                sums += torch.stack([self._surrogate_loss(part, states), kl.sum()])
            return sums

        sums = self.runtime.sum(self._forward_passes.run(experience, self._own_share(experience), run_passes))
        loss, mean_kl = (sums / experience.response_mask.sum()).tolist()
        return loss, mean_kl

    def _surrogate_loss(self, part: Experience, states: Tensor) -> Tensor:
        """−ρA summed over the real tokens of `part`: PPO's loss without clipping, since the trust region bounds ρ."""
        mask = part.response_mask
        logprobs = self.policy.logprobs(states, part.response_ids, mask, self.config.temperature)
        return masked_sum(policy_loss(logprobs, part.logprobs, part.advantages, cliprange=math.inf)[0], mask)

    def _fit_critic(self, experience: Experience) -> float:
        """Makes optimiser steps of the critic towards the returns; returns the mean of its losses."""

        def losses(part: Experience) -> tuple[Tensor, dict[str, Tensor]]:
            values = self.critic(part, None)  # it has a trunk of its own
            loss, _ = value_loss(values, part.values, part.returns, cliprange_value=math.inf)
            return masked_sum(loss, part.response_mask), {}

        everything = torch.arange(len(experience.scores), device=self.runtime.device)
        total = 0.0
        for _ in range(self.config.value_epochs):
            total += self.optimisation.backward(experience, everything, losses)["loss"]
            self.optimisation.step()
        return total / self.config.value_epochs

    def _in_passes(self, experience: Experience, work: Callable[[list[Tensor]], T]) -> T:
        """Calls `work` with this process's samples, cut into passes with gradients that fit in memory."""
        return self._training_passes.run(experience, self._own_share(experience), work)

    def _own_share(self, experience: Experience) -> Tensor:
        return self.runtime.share(torch.arange(len(experience.scores), device=self.runtime.device))

    def _as_parameters(self, vector: Tensor) -> list[Tensor]:
        """Cuts a vector [D] into tensors of the shapes of the trainable weights."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def state(self) -> dict[str, Any]:
        """The weights of the critic and the state of its optimiser."""
        return {"critic": trainable_tensors(self.critic), "optimisation": self.optimisation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        load_tensors(self.critic, state["critic"])
        self.optimisation.load_state(state["optimisation"])


class TRPOTrainer(OnlineTrainer):
    """Trains with TRPO: `TRPOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = TRPO


@torch.no_grad()
def _copy_values(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for old, new in zip(source, target, strict=True):
        new.copy_(old)


def _states(policy: Policy, part: Experience) -> Tensor:
    """The hidden states [n, R, H] before each response token."""
    return policy.states(part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

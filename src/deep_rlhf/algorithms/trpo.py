"""Trust region policy optimisation of a language model against a reward on text (Schulman et al. 2015).

The algorithm behind the robotics of Christiano et al. 2017. One update: advantages as in PPO; the direction F⁻¹g by
conjugate gradient, where g is the gradient of the surrogate and F the Fisher matrix of the policy; the longest step
along it that moves the policy by at most `max_kl`; and a line search that halves the step until the surrogate does
improve and the KL does stay within bounds. If no step is acceptable, the old parameters are put back. Where it
departs from the paper:
- advantages come from a critic (GAE, Schulman et al. 2016), which is a model of its own: fitting it moves no policy;
- surrogate and KL are means over the real tokens of all responses, so `max_kl` is in nats per token;
- F v is computed on all tokens of the batch (the paper takes a tenth of them), by differentiating the KL twice;
- `lr_scheduler_type` shrinks the trust region, too: without that the last steps would be as long as the first.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.build import load_tensors, trainable_tensors
from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.algorithms.online.optimiser_step import NotFiniteError, Optimisation
from deep_rlhf.algorithms.online.trainer import OnlineTrainer
from deep_rlhf.errors import UserError
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
from deep_rlhf.types import Experience, Rollout, Scorer

T = TypeVar("T")

CG_TOLERANCE = 1e-5  # of the residual relative to the target: float32 has no more to give

twice_differentiable = sdpa_kernel(SDPBackend.MATH)  # the fused kernels of attention are not


@dataclass(frozen=True)
class TRPOConfig(OnlineConfig):
    """What TRPO adds to the settings of every online algorithm. Raises UserError for values that cannot work."""

    exp_name: str = field(default="trpo", metadata={"help": "the run's name"})
    precision: Precision = field(
        default="fp32", metadata={"help": "fp32: bf16 is too coarse for products with the Fisher matrix"}
    )
    learning_rate: float = field(default=1.41e-5, metadata={"help": "Adam's step size for the critic"})
    max_kl: float = field(
        default=0.01,
        metadata={"help": "by how much one update may move the policy, nats per token; falls as learning_rate² does"},
    )
    cg_iterations: int = field(default=10, metadata={"help": "products with the Fisher matrix per update"})
    cg_damping: float = field(default=0.1, metadata={"help": "what is added to the Fisher matrix's diagonal"})
    line_search_steps: int = field(default=10, metadata={"help": "how often a step is tried, each half as long"})
    value_epochs: int = field(default=5, metadata={"help": "steps of the critic per update, on the whole batch"})
    gamma: float = field(default=1.0, metadata={"help": "discount"})
    lam: float = field(default=0.95, metadata={"help": "lambda of generalised advantage estimation"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("max_kl", above=0)
        self.check_range("cg_iterations", "line_search_steps", "value_epochs", least=1)
        self.check_range("cg_damping", least=0)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if self.precision != "fp32":
            raise UserError(
                f"precision={self.precision} is too coarse for the products with TRPO's Fisher matrix: use fp32."
            )
        if self.kl_in_loss:
            raise UserError("kl_in_loss is for PPO and GRPO: TRPO has its KL in the reward, so leave it out.")


class TRPO:
    """The learner: what TRPO does with a rollout."""

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
        self._looks = ForwardPasses(policy, training=False, max_rows=config.forward_batch_size)
        self._passes = ForwardPasses(policy, training=True, max_rows=config.forward_batch_size)
        frozen = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
        self._old = copy.deepcopy(policy, frozen)  # shares what is never trained
        self._old_parameters = self._old.trainable_parameters()
        self._old.requires_grad_(False)

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """One update: experience, a step of the policy within the trust region, then a few of the critic."""
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
        """Rewards, advantages and returns of a rollout."""
        config, mask = self.config, rollout.response_mask
        rewards = token_rewards(rollout.shaped_scores, rollout.kl, mask, kl_coef)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        return experience_from(rollout, rewards=rewards, advantages=whiten(advantages, mask), returns=returns)

    def _improve_policy(self, experience: Experience) -> dict[str, float]:
        """Takes the longest acceptable step along F⁻¹g, or none (eq. 14 and appendix C). Raises NotFiniteError."""
        config = self.config
        _copy(self.parameters, self._old_parameters)
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
            _copy(self._as_parameters(start + fraction * step), self.parameters)
            after = self._loss_and_kl(experience)
            return old_loss - after[0], after[1]

        fraction = backtracking(evaluate, max_kl=max_kl, attempts=config.line_search_steps)
        if fraction == 0:
            _copy(self._old_parameters, self.parameters)
            after = (old_loss, 0.0)
        return {
            "policy_loss": after[0],
            "approx_kl": after[1],
            "max_kl": max_kl,
            "grad_norm": float(gradient.norm()),
            "step_fraction": fraction,
        }

    def fisher(self, experience: Experience) -> Callable[[Tensor], Tensor]:
        """v [D] -> F v [D] for the trainable weights as one vector; F is the Hessian of the mean KL over the tokens.

        The KL is that from the policy as it is now, whose gradient is 0 here, so its Hessian is the Fisher matrix.
        Memory is that of one forward pass; a batch that is no more than that is passed once, not for every product.
        """
        tokens = experience.response_mask.sum()
        kept: list[Sequence[Tensor]] = []

        @twice_differentiable
        def product(vector: Tensor) -> Tensor:
            directions = self._as_parameters(vector)

            def passes(parts: list[Tensor]) -> Tensor:
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

            return self.runtime.sum(self._in_passes(experience, passes)) / tokens

        return product

    @twice_differentiable
    def _kl_slopes(self, part: Experience) -> Sequence[Tensor]:
        """The gradient of KL(now ‖ weights), summed over the tokens of `part`, as a function that has a gradient."""
        states = _states(self.policy, part)[part.response_mask]
        logprobs = (self.policy.head(states).float() / self.config.temperature).log_softmax(-1)
        return self._gradient(kl_full(logprobs.detach(), logprobs).sum(), create_graph=True)

    def _gradient(self, of: Tensor, *, retain_graph: bool = False, create_graph: bool = False) -> Sequence[Tensor]:
        """Of the trainable weights; zeros for one that has no part in `of`."""
        return torch.autograd.grad(
            of,
            self.parameters,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            materialize_grads=True,
        )

    def _loss_and_gradient(self, experience: Experience) -> tuple[float, Tensor]:
        """The surrogate loss per token, and its gradient [D] as one vector."""

        def passes(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
            gradient = torch.zeros_like(_vector(self._old_parameters))
            total = torch.zeros((), device=gradient.device)
            for rows in parts:
                part = select(experience, rows)
                loss = self._surrogate_loss(part, _states(self.policy, part))
                gradient += _vector(self._gradient(loss))
                total += loss.detach()
            return total, gradient

        total, gradient = self._in_passes(experience, passes)
        tokens = experience.response_mask.sum()
        return float(self.runtime.sum(total) / tokens), self.runtime.sum(gradient) / tokens

    @torch.no_grad()
    def _loss_and_kl(self, experience: Experience) -> tuple[float, float]:
        """The surrogate loss per token of the policy as it is now, and the exact KL(old ‖ now) per token in nats."""

        def passes(parts: list[Tensor]) -> Tensor:
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

        sums = self.runtime.sum(self._looks.run(experience, self._own_share(experience), passes))
        loss, mean_kl = (sums / experience.response_mask.sum()).tolist()
        return loss, mean_kl

    def _surrogate_loss(self, part: Experience, states: Tensor) -> Tensor:
        """−ρA summed over the real tokens of `part`: PPO's loss without its clipping, for the trust region bounds ρ."""
        mask = part.response_mask
        logprobs = self.policy.logprobs(states, part.response_ids, mask, self.config.temperature)
        return masked_sum(policy_loss(logprobs, part.logprobs, part.advantages, cliprange=math.inf)[0], mask)

    def _fit_critic(self, experience: Experience) -> float:
        """Steps of Adam towards the returns; the mean loss of the critic on the way."""

        def losses(part: Experience) -> tuple[Tensor, dict[str, Tensor]]:
            values = self.critic(part, part.values)  # a critic with its own trunk reads no states of the policy
            loss, _ = value_loss(values, part.values, part.returns, cliprange_value=math.inf)
            return masked_sum(loss, part.response_mask), {}

        everything = torch.arange(len(experience.scores), device=self.runtime.device)
        total = 0.0
        for _ in range(self.config.value_epochs):
            total += self.optimisation.backward(experience, everything, losses)["loss"]
            self.optimisation.step()
        return total / self.config.value_epochs

    def _in_passes(self, experience: Experience, work: Callable[[list[Tensor]], T]) -> T:
        """`work` on this process's share of the samples, cut into as many parts as passes with gradients are needed."""
        return self._passes.run(experience, self._own_share(experience), work)

    def _own_share(self, experience: Experience) -> Tensor:
        return self.runtime.share(torch.arange(len(experience.scores), device=self.runtime.device))

    def _as_parameters(self, vector: Tensor) -> list[Tensor]:
        """A vector [D] cut into tensors of the shapes of the trainable weights."""
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def state(self) -> dict[str, Any]:
        return {"critic": trainable_tensors(self.critic), "optimisation": self.optimisation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        load_tensors(self.critic, state["critic"])
        self.optimisation.load_state(state["optimisation"])


class TRPOTrainer(OnlineTrainer):
    """`OnlineTrainer` with TRPO as its learner: `TRPOTrainer(config, prompts=…, reward=…).train()`."""

    make_learner = TRPO


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for old, new in zip(source, target, strict=True):
        new.copy_(old)


def _states(policy: Policy, part: Experience) -> Tensor:
    """The hidden states [n, R, H] before the tokens of the responses."""
    return policy.states(part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

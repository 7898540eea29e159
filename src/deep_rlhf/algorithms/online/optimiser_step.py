"""One optimiser step on some samples of an experience, the same for every algorithm that follows a gradient.

Every process holds the whole experience (it is small) and computes its share of a minibatch in as many forward passes
as fit. Losses are summed, divided by a global count and their gradients added up over the processes, so neither the
cut into forward passes nor the number of processes changes anything. What is not finite never reaches the weights:
an update ends at the first number that is not, and the finite steps before it stay.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from deep_rlhf.accel.cpu.allocator import release_freed_memory
from deep_rlhf.accel.cpu.attention import fast_attention
from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.models.critic import Critic
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.masked import masked_sum
from deep_rlhf.rollout.passes import ForwardPasses
from deep_rlhf.rollout.records import select
from deep_rlhf.runtime.precision import make_adamw
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.types import Experience, Rollout

Losses = Callable[[Experience], tuple[Tensor, dict[str, Tensor]]]


class NotFiniteError(Exception):
    """A NaN or an infinity was met, before it reached any weight; the message says where."""


class Learner(Protocol):
    """An algorithm: it changes the policy so that rollouts like the one it is shown score higher."""

    @property
    def critic(self) -> Critic | None:
        """Whose values a rollout holds, if the algorithm has one."""
        ...

    def learn(self, rollout: Rollout, *, kl_coef: float, update: int) -> dict[str, float]:
        """One update from a rollout of all processes; returns metrics, or raises NotFiniteError."""
        ...

    def state(self) -> dict[str, Any]:
        """What a continuation needs beside the weights."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        ...


class Optimisation:
    """AdamW with eps 1e-5 (Huang et al. 2024) and its schedule over the updates of a run."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        policy: Policy,
        critic: Critic | None,
        config: OnlineConfig,
        runtime: Runtime,
        *,
        updates: int,
        max_rows: int | None,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """`parameters` are what is trained: the policy's, its critic's, or both.

        `max_rows` is the most samples in one forward pass, beside what its tokens allow. Another `optimizer` brings its
        own parameters and `schedule`; without one its learning rate stays.
        """
        if optimizer is None:
            self.parameters = parameters
            self.adam: torch.optim.Optimizer = make_adamw(
                config.optimizer, parameters, lr=config.learning_rate, eps=1e-5, weight_decay=0.0
            )
            schedule = get_scheduler(config.lr_scheduler_type, self.adam, 0, updates)
        else:
            self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.adam = optimizer
        self.schedule = schedule or torch.optim.lr_scheduler.ConstantLR(self.adam, factor=1.0, total_iters=0)
        self._max_grad_norm = config.max_grad_norm or float("inf")
        self._runtime = runtime
        self._policy = policy
        trunks = [policy] if critic is None or critic.own_trunk is None else [policy, critic.own_trunk]
        self._models = [trunk.language_model for trunk in trunks]
        self._passes = ForwardPasses(policy, training=True, max_rows=max_rows, trunks=len(trunks))

    def backward(
        self, experience: Experience, minibatch: Tensor, losses: Losses, *, count: Tensor | None = None
    ) -> dict[str, float]:
        """Gradients of the loss of the samples `minibatch`; returns the means of what `losses` reports.

        `losses(part)` gives the loss summed over the real tokens of `part`, and what is reported per token [n, R].
        The sum is divided by `count`, by default the number of real tokens of the minibatch. Raises NotFiniteError.
        """
        tokens = experience.response_mask[minibatch].sum()
        count = tokens if count is None else count

        def passes(parts: list[Tensor]) -> tuple[list[str], Tensor]:
            self.adam.zero_grad()
            names: list[str] = []
            sums = torch.zeros(0, device=tokens.device)
            with ExitStack() as stack:
                for model in self._models:
                    stack.enter_context(gradients_in_place(model))
                release_freed_memory()  # what comes next takes other sizes, and would not fit into the holes
                for rows in parts:
                    part = select(experience, rows)
                    loss, reported = losses(part)
                    (loss / count).backward()
                    names = ["loss", *reported]
                    here = [
                        loss.detach(),
                        *(masked_sum(values.detach().float(), part.response_mask) for values in reported.values()),
                    ]
                    sums = torch.stack(here) + (sums if len(sums) else 0.0)
                release_freed_memory()  # for the gradient of the table of tokens, and for the step
            return names, sums

        with fast_attention(self._policy.dtype, self._policy.device):
            names, sums = self._passes.run(experience, self._runtime.share(minibatch), passes)
        names = next(filter(None, self._runtime.gather(names)))  # a process without work does not know them
        sums = self._runtime.sum(sums if len(sums) else torch.zeros(len(names), device=tokens.device))
        means = dict(zip(names, (sums / tokens).tolist(), strict=True))
        means["loss"] = float(sums[0] / count)
        if not torch.isfinite(sums[0]):
            self.forget_gradients()
            raise NotFiniteError(f"the loss is {means['loss']}")
        self._runtime.sum_gradients(self.parameters)
        return means

    def step(self) -> float:
        """Follows the gradients, scaled down to max_grad_norm, forgets them and returns their norm.

        Raises NotFiniteError.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm))
        if not norm < float("inf"):
            self.forget_gradients()
            raise NotFiniteError(f"the gradient's norm is {norm}")
        self.adam.step()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        """Sampling needs the room."""
        self.adam.zero_grad()

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def state(self) -> dict[str, Any]:
        """Everything that a continuation needs, for `load_state`."""
        return {"adam": self.adam.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.schedule.load_state_dict(state["schedule"])


def minibatches(generator: torch.Generator, samples: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """A permutation of the samples, cut into minibatches of `size`."""
    yield from torch.randperm(samples, generator=generator).to(device).split(size)


def mean_of_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The means over the optimiser steps of an update, and how many there were.

    `sampler_logprob_gap` is the first step's alone: after it the policy is no longer the one that sampled.
    """
    means = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else {})}
    if steps:
        means["sampler_logprob_gap"] = steps[0]["sampler_logprob_gap"]
    return {"optimizer_steps": float(len(steps)), **means}


def policy_metrics(logprobs: Tensor, part: Experience, clipped: Tensor) -> dict[str, Tensor]:
    """How far the policy moved since it sampled, per token; `clipped` [n, R] or [n, 1] is True without gradient."""
    logprobs = logprobs.detach()
    change = logprobs - part.logprobs
    return {
        "policy_clip_fraction": clipped.expand_as(change),
        "approx_kl": 0.5 * change**2,
        "ratio": change.exp(),
        "sampler_logprob_gap": (logprobs - part.sampler_logprobs).abs(),
    }

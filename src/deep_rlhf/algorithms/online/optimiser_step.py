"""One optimiser step on a minibatch of an experience, the same for every algorithm that follows a gradient.

Every process holds the whole experience (it is small) and computes its share of a minibatch in as many forward passes
as needed. Losses are summed, divided by a global count, and the gradients are summed over the processes, so neither the
cut into forward passes nor the number of processes changes the result. A number that is not finite never reaches the
weights: the update ends there, and the steps before it are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from deep_rlhf.accel.cpu.allocator import release_freed_memory
from deep_rlhf.accel.cpu.attention import fast_attention
from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.algorithms.online.config import OnlineConfig
from deep_rlhf.errors import NotFiniteError
from deep_rlhf.models.critic import Critic
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.masked import masked_sum
from deep_rlhf.rollout.passes import ForwardPasses
from deep_rlhf.rollout.records import select
from deep_rlhf.runtime.optimisers.adamw import make_adamw
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.types import Experience

Losses = Callable[[Experience], tuple[Tensor, dict[str, Tensor]]]


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
        """`parameters` are the trained ones: the policy's, its critic's, or both.

        `max_rows` limits the samples of one forward pass, in addition to its token budget. An `optimizer` given here
        replaces AdamW: it has its own parameters and `schedule`; without a schedule its learning rate stays constant.
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
        """Computes the gradients of the loss of a minibatch; returns the loss and the mean of each metric per token.

        `minibatch` [m] are rows of the experience. `losses(part)` returns the loss summed over the real tokens of
        `part`, and metrics per token [n, R]. The sum is divided by `count`, by default the number of real tokens of
        the minibatch over all processes. Raises NotFiniteError.
        """
        tokens = experience.response_mask[minibatch].sum()
        count = tokens if count is None else count

        def run_passes(parts: list[Tensor]) -> tuple[list[str], Tensor]:
            self.adam.zero_grad()
            names: list[str] = []
            sums = torch.zeros(0, device=tokens.device)
            with ExitStack() as stack:
                for model in self._models:
                    stack.enter_context(gradients_in_place(model))
                release_freed_memory()  # the passes allocate other sizes, which would not fit into the holes
                for rows in parts:
                    part = select(experience, rows)
                    loss, metrics = losses(part)
                    (loss / count).backward()
                    names = ["loss", *metrics]
                    part_sums = [
                        loss.detach(),
                        *(masked_sum(values.detach().float(), part.response_mask) for values in metrics.values()),
                    ]
                    sums = torch.stack(part_sums) + (sums if len(sums) else 0.0)
                release_freed_memory()  # for the gradient of the token embeddings, and for the step
            return names, sums

        with fast_attention(self._policy.dtype, self._policy.device):
            names, sums = self._passes.run(experience, self._runtime.share(minibatch), run_passes)
        names = next(filter(None, self._runtime.gather(names)))  # a process without samples does not know them
        sums = self._runtime.sum(sums if len(sums) else torch.zeros(len(names), device=tokens.device))
        means = dict(zip(names, (sums / tokens).tolist(), strict=True))
        means["loss"] = float(sums[0] / count)
        if not torch.isfinite(sums[0]):
            self.clear_gradients()
            raise NotFiniteError(f"the loss is {means['loss']}")
        self._runtime.sum_gradients(self.parameters)
        return means

    def step(self) -> float:
        """Clips the gradients to max_grad_norm, makes a step, clears them and returns their norm before clipping.

        Raises NotFiniteError.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm))
        if not norm < float("inf"):
            self.clear_gradients()
            raise NotFiniteError(f"the gradient's norm is {norm}")
        self.adam.step()
        self.clear_gradients()
        return norm

    def clear_gradients(self) -> None:
        """Clears gradients (frees memory before sampling)."""
        self.adam.zero_grad()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def set_learning_rate(self, rate: float) -> None:
        """Replaces the learning rate that the schedule starts from, which a restored state has brought along."""
        before = list(self.schedule.base_lrs)
        if all(base == rate for base in before):
            return
        for group, base in zip(self.adam.param_groups, before, strict=True):
            group["lr"] = rate * (group["lr"] / base)
            group["initial_lr"] = rate
        self.schedule.base_lrs = [rate for _ in before]
        self.schedule._last_lr = [float(group["lr"]) for group in self.adam.param_groups]

    def state(self) -> dict[str, Any]:
        """The state of optimiser and schedule, for `load_state`."""
        return {"adam": self.adam.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.adam.load_state_dict(state["adam"])
        self.schedule.load_state_dict(state["schedule"])


def minibatches(generator: torch.Generator, samples: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """A random permutation of the samples, cut into minibatches of `size`."""
    yield from torch.randperm(samples, generator=generator).to(device).split(size)

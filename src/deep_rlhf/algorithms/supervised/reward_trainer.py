"""transformers.Trainer with the Bradley–Terry loss of pairs, in micro-batches that memory holds.

Where it departs from transformers: a batch is computed in parts under a budget of tokens, each with a backward pass of
its own. Their losses are divided by the pairs of the whole update, so the budget changes nothing but time and memory.
"""

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import EvalPrediction

from deep_rlhf.accel.cpu.allocator import kept_memory, release_freed_memory
from deep_rlhf.accel.cpu.attention import fast_attention
from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.algorithms.supervised.resumable import ResumableTrainer
from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.data.batching import token_budget_batches
from deep_rlhf.errors import UserError
from deep_rlhf.models.pairs import PairScorer
from deep_rlhf.ops.preference import bradley_terry_loss
from deep_rlhf.runtime.memory import is_out_of_memory
from deep_rlhf.runtime.optimisers.adamw import MasterAdamW
from deep_rlhf.runtime.precision import (
    cast_around_embeddings,
    cast_weights,
    compute_dtype,
    hidden_width,
    multiplies_bf16,
)

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 32768}  # in one forward and backward pass; on a CPU more were not faster

Features = dict[str, Any]
Inputs = dict[str, Tensor]


class RewardTrainer(ResumableTrainer):
    """transformers.Trainer with the Bradley–Terry loss, averaged over the global number of pairs of an update."""

    def __init__(self, model: nn.Module, args: RewardConfig, *, pad_token_id: int, **options: Any) -> None:
        """`model` is a sequence classifier, plain or a peft.PeftModel around one, with float32 weights.

        Raises UserError for a precision that the run cannot have.
        """
        use_fast_kernels(model)
        super().__init__(
            model,
            args,
            data_collator=partial(collate, pad_token_id=pad_token_id),
            compute_metrics=partial(_metrics_of_prediction, label_noise=args.label_noise),
            **options,
        )
        self.model_accepts_loss_kwargs = True  # so that the pairs of all micro-batches and processes are counted
        self.label_names = ["labels", "longer", "label_noise"]
        self.tokens = TOKENS_AT_ONCE.get(args.device.type, TOKENS_AT_ONCE["cuda"])
        # Whoever shards or replicates the model wants the same number of passes everywhere, over the whole model.
        self._in_parts = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or args.n_gpu > 1)
        if not self._in_parts:
            self.tokens = sys.maxsize
        self._since_update: list[Inputs] = []
        self._embedding_casts: list[RemovableHandle] = []
        self._masters: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.dtype = compute_dtype(args.precision, multiplies_bf16(args.device), hidden_width(model))
        if not self._in_parts and self.dtype != torch.float32:
            if args.precision == "bf16":
                raise UserError(
                    "--precision=bf16 is for one device per process without FSDP or DeepSpeed: leave it out."
                )
            self.dtype = torch.float32
        self.run_flags["number format"] = str(self.dtype)
        limits = (args.max_length, getattr(model.config, "max_position_embeddings", None))
        longest = min(limit for limit in limits if limit)
        self.scorer = PairScorer(model, pad_token_id=pad_token_id, longest=longest)
        if self._in_parts:
            self.scorer.share_prefix(model)

    def train(self, *args: Any, **options: Any) -> Any:
        """As transformers' Trainer does."""
        with kept_memory():
            return super().train(*args, **options)

    # ---- the loss

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Adds the gradients of a batch's loss, micro-batch by micro-batch, and returns the loss.

        Out of memory halves the micro-batches, and everything since the last update is computed again. Raises UserError
        when one pair is too much.
        """
        if not self._in_parts:
            return super().training_step(model, inputs, num_items_in_batch)
        self._since_update.append(inputs)
        loss = self._backward(model, [inputs], num_items_in_batch)
        while loss is None:
            self._halve()
            model.zero_grad()  # a part of the failed pass may be in there
            loss = self._backward(model, self._since_update, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._since_update.clear()
            if self.args.world_size > 1:
                self._average_gradients()
        return loss

    def _backward(self, model: nn.Module, batches: list[Inputs], count: Tensor | int | None) -> Tensor | None:
        """The last batch's loss, or None when memory ran out."""
        # Gradients are averaged once, by us: a pass that failed half-way could not be repeated by all processes.
        step, losses = super().training_step, list[Tensor]()
        try:
            with (
                gradients_in_place(self.model),
                fast_attention(self.dtype, self.args.device),
                self.accelerator.no_sync(model),
            ):
                for batch in batches:
                    release_freed_memory()  # what comes next takes other sizes, and would not fit into the holes
                    losses = [step(model, part, count) for part in self._parts(batch)]
                    release_freed_memory()  # for the gradient of the table of tokens, and for the step
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return torch.stack(losses).sum()

    def _parts(self, batch: Inputs) -> Iterator[Inputs]:
        """Micro-batches of pairs of like length."""
        sizes = self.scorer.tokens(batch["lengths"].tolist())
        for rows in token_budget_batches(sizes, self.tokens):
            yield {name: values[rows] for name, values in batch.items()}

    def _halve(self) -> None:
        if self.tokens == 1:
            raise UserError(
                "There is not enough memory for a single pair: lower --max_length, or give --gradient_checkpointing."
            )
        self.tokens //= 2
        logger.warning("Out of memory: from here on a pass holds %d tokens, one pair at least.", self.tokens)

    def _average_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Σ over pairs of the weighted loss, averaged over members, / the global number of pairs of the update.

        With `center_rewards_coefficient` c, c (r_a + r_b)² is added per pair (Eisenstein et al. 2023).
        """
        rewards = self.scorer.rewards(model, inputs["input_ids"], inputs["lengths"], tokens=self.tokens)  # [B, 2, K]
        a, b = rewards.unbind(1)
        mu, margin = inputs["labels"][:, None].expand_as(a), inputs["margin"][:, None]
        noise = label_noise_of(inputs["label_noise"][:, None], self.args.label_noise)
        loss = inputs["weight"] * bradley_terry_loss(a, b, mu, margin=margin, label_noise=noise)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (inputs["weight"] > 0) * (a + b) ** 2
        total = loss.mean(dim=1).sum()
        if num_items_in_batch is None:
            mean = total / len(a)
        else:
            # Gradients are averaged over processes, but this sum is divided by the pairs of all of them.
            shares = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            mean = shares * total / num_items_in_batch
        return (mean, {"rewards": rewards}) if return_outputs else mean

    def rewards(self, features: Sequence[Features]) -> Tensor:
        """The raw rewards [N, 2, K] of every pair's answers, float32 on the CPU."""
        order = by_length(features)
        rewards = torch.empty(len(features), 2, self.model.config.num_labels)
        rewards[order] = torch.from_numpy(self.predict([features[row] for row in order]).predictions)
        return rewards

    # ---- the number format

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers', but bf16 weights get float32 masters. The table of token embeddings is its own master."""
        if self.dtype == torch.float32 or self.optimizer is not None:
            return super().create_optimizer(model)
        self._embedding_casts = cast_around_embeddings(self.model, self.dtype)
        _, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer_cls_and_kwargs = MasterAdamW, {key: value for key, value in settings.items() if key != "fused"}
        optimizer = super().create_optimizer(model)
        self._masters = optimizer.masters()
        return optimizer

    def widen(self) -> nn.Module:
        """The model with its float32 weights, for good: training is over. What has no master is cast."""
        for parameter, master in self._masters:
            parameter.data = master.data
        cast_weights(self.model, torch.float32)
        for handle in self._embedding_casts:
            handle.remove()
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @contextmanager
    def _float32_weights(self) -> Iterator[None]:
        """While it lasts the model holds its masters."""
        for parameter, master in self._masters:
            parameter.data = master.data
        try:
            yield
        finally:
            for parameter, master in self._masters:
                parameter.data = master.data.to(self.dtype)

    def _save(self, *args: Any, **options: Any) -> None:
        with self._float32_weights():
            super()._save(*args, **options)

    def _load_best_model(self) -> None:
        with self._float32_weights():
            super()._load_best_model()


def collate(features: Sequence[Features], *, pad_token_id: int) -> Inputs:
    """B pairs: `input_ids` [B, T] and `lengths` [B, 3] as in models.pairs, `weight` [B, K], the others [B]."""
    rows = [pair["input_ids"] for pair in features]
    batch = {"input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id).long()}
    batch["weight"] = torch.stack([pair["weight"] for pair in features])
    for name in ("lengths", "labels", "margin", "longer"):
        batch[name] = torch.tensor([pair[name] for pair in features])
    batch["label_noise"] = told_noise(features)
    return batch


def told_noise(features: Sequence[Features]) -> Tensor:
    """[B]: the share of random answers of each pair's annotator, NaN where it is not told."""
    return torch.tensor([pair.get("label_noise", math.nan) for pair in features])


def label_noise_of(told: Tensor, assumed: float) -> Tensor | float:
    """`told` with the run's share in place of NaN; just the number where nothing is told."""
    unknown = told.isnan()
    return assumed if unknown.all() else told.masked_fill(unknown, assumed)


def by_length(features: Sequence[Features]) -> list[int]:
    """The order in which batches hold little padding."""
    return sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))


def pair_metrics(rewards: Tensor, mu: Tensor, longer: Tensor, *, label_noise: Tensor | float = 0.0) -> dict[str, float]:
    """How well rewards [N, 2, K] predict mu [N]: of the members' mean, the loss and the accuracy.

    longer [N]: 1 where a is the longer answer, 0 where b is, ½ where neither. All pairs count alike, without margin.
    label_noise: of all, or [N].
    """
    a, b = rewards.mean(dim=2).unbind(1)
    return {
        "loss": bradley_terry_loss(a, b, mu, label_noise=label_noise).mean().item(),
        "accuracy": accuracy(a - b, mu),
        "accuracy_length_baseline": accuracy(longer - 0.5, mu),
    }


def accuracy(advantage: Tensor, mu: Tensor) -> float:
    """Share of the N pairs whose preferred answer has the advantage (> 0 for a); no advantage counts ½.

    Pairs that people called a tie are left out; ½ if there is no other.
    """
    decided = mu != 0.5
    if not decided.any():
        return 0.5
    agreement = torch.sign(advantage[decided]) * torch.sign(mu[decided] - 0.5)
    return (0.5 + 0.5 * agreement).mean().item()


def _metrics_of_prediction(prediction: EvalPrediction, *, label_noise: float) -> dict[str, float]:
    rewards, mu, longer, told = map(torch.from_numpy, (prediction.predictions, *prediction.label_ids))
    return pair_metrics(rewards, mu, longer, label_noise=label_noise_of(told, label_noise))

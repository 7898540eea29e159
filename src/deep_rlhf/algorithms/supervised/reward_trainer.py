"""Training of a reward model with the Bradley–Terry loss, in micro-batches that fit in memory.

A batch is computed in parts under a budget of tokens, each with a backward pass of its own. Their losses are divided by
the pairs of the whole update, so the budget changes only time and memory.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from deep_rlhf.accel.cpu.allocator import kept_memory, release_freed_memory
from deep_rlhf.accel.cpu.attention import fast_attention
from deep_rlhf.accel.cpu.gradients import gradients_in_place
from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.algorithms.supervised.batches import Batch
from deep_rlhf.algorithms.supervised.loop import SupervisedTrainer
from deep_rlhf.algorithms.supervised.optimiser import make_optimizer
from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.errors import ResourceError
from deep_rlhf.models.pairs import PairScorer
from deep_rlhf.ops.preference import bradley_terry_loss
from deep_rlhf.runtime.memory import is_out_of_memory, token_budget_batches
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


class RewardTrainer(SupervisedTrainer):
    """Trains a sequence classifier on `pair_features`; the loss is averaged over all pairs of an update."""

    config: RewardConfig

    def __init__(
        self,
        model: nn.Module,
        config: RewardConfig,
        *,
        pad_token_id: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        """model: a sequence classifier, plain or a peft.PeftModel around one, with float32 weights.

        tokenizer: if given, the configuration of the model takes over its special tokens when training begins. options:
        data sets and callbacks, as SupervisedTrainer takes them.
        """
        use_fast_kernels(model)
        super().__init__(model, config, **options)
        self.pad_token_id = pad_token_id
        self.tokenizer = tokenizer
        self.tokens = TOKENS_AT_ONCE.get(config.device.type, TOKENS_AT_ONCE["cuda"])
        self._embedding_casts: list[RemovableHandle] = []
        self._masters: dict[int, nn.Parameter] = {}  # by the id of their parameter
        self.dtype = compute_dtype(config.precision, multiplies_bf16(config.device), hidden_width(model))
        self.run_flags["number format"] = str(self.dtype)
        limits = (config.max_length, getattr(self.model.config, "max_position_embeddings", None))
        longest = min(limit for limit in limits if limit)
        self.scorer = PairScorer(model, pad_token_id=pad_token_id, longest=longest)
        self.scorer.share_prefix(model)

    def train(self) -> dict[str, float]:
        """As SupervisedTrainer.train. Raises ResourceError if a single pair does not fit in memory."""
        if self.tokenizer is not None:
            _take_special_tokens(self.model.config.get_text_config(), self.tokenizer)
        with kept_memory():
            return super().train()

    # ---- the loss

    def collate(self, examples: list[Features]) -> Batch:
        """As the function `collate`."""
        return collate(examples, pad_token_id=self.pad_token_id)

    def gradients(self, batches: Sequence[Batch], count: Tensor) -> list[Tensor]:
        """Adds the gradients of Σ loss / count, micro-batch by micro-batch, and returns each batch's share of the loss.

        If memory runs out, micro-batches are halved and the whole update is computed again. Raises ResourceError if one
        pair is too much.
        """
        while (losses := self._backward(batches, count)) is None:
            self._halve()
            self.model.zero_grad()  # a part of the failed pass may be in there
        return losses

    def _backward(self, batches: Sequence[Batch], count: Tensor) -> list[Tensor] | None:
        """The losses, or None when memory ran out."""
        losses = []
        try:
            with gradients_in_place(self.model), fast_attention(self.dtype, self.config.device):
                for batch in batches:
                    release_freed_memory()  # the next tensors have other sizes and would not fit into the holes
                    parts = [super(RewardTrainer, self).gradients([part], count)[0] for part in self._parts(batch)]
                    losses.append(torch.stack(parts).sum())
                    release_freed_memory()  # for the gradient of the token embeddings and for the optimiser's step
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return losses

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Micro-batches of pairs of similar length."""
        sizes = self.scorer.tokens(batch["lengths"].tolist())
        for rows in token_budget_batches(sizes, self.tokens):
            yield {name: values[rows] for name, values in batch.items()}

    def _halve(self) -> None:
        if self.tokens == 1:
            raise ResourceError(
                "There is not enough memory for a single pair: lower --max_length, or give --gradient_checkpointing."
            )
        self.tokens //= 2
        logger.warning("Out of memory: from now on a pass holds %d tokens, or one pair if that is longer.", self.tokens)

    def loss(self, batch: Batch) -> Tensor:
        """Σ over pairs of the weighted loss, averaged over members.

        With `center_rewards_coefficient` c, c (r_a + r_b)² is added per pair (Eisenstein et al. 2023).
        """
        a, b = self.outputs(batch).unbind(1)  # [B, K]
        mu, margin = batch["labels"][:, None].expand_as(a), batch["margin"][:, None]
        noise = label_noise_of(batch["label_noise"][:, None], self.config.label_noise)
        loss = batch["weight"] * bradley_terry_loss(a, b, mu, margin=margin, label_noise=noise)
        if self.config.center_rewards_coefficient is not None:
            loss = loss + self.config.center_rewards_coefficient * (batch["weight"] > 0) * (a + b) ** 2
        return loss.mean(dim=1).sum()

    # ---- evaluation

    def outputs(self, batch: Batch) -> Tensor:
        """The raw rewards [B, 2, K] of both responses."""
        return self.scorer.rewards(self.model, batch["input_ids"], batch["lengths"], tokens=self.tokens)

    def metrics(self, outputs: Tensor, examples: Sequence[Features]) -> dict[str, float]:
        """As `pair_metrics`."""
        mu, longer = (torch.tensor([pair[name] for pair in examples]) for name in ("labels", "longer"))
        noise = label_noise_of(stated_noise(examples), self.config.label_noise)
        return pair_metrics(outputs, mu, longer, label_noise=noise)

    def rewards(self, features: Sequence[Features]) -> Tensor:
        """The raw rewards [N, 2, K] of every pair's responses, float32 on the CPU."""
        order = by_length(features)
        rewards = torch.empty(len(features), 2, self.model.config.num_labels)
        rewards[order] = self.predict([features[row] for row in order])
        return rewards

    # ---- the number format

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The configured optimiser; bf16 weights get float32 masters, and the token embeddings stay float32."""
        if self.dtype == torch.float32:
            return super().make_optimizer()
        self._embedding_casts = cast_around_embeddings(self.model, self.dtype)
        optimizer = make_optimizer(self.model, self.config, MasterAdamW)
        assert isinstance(optimizer, MasterAdamW)
        self._masters = {id(parameter): master for parameter, master in optimizer.masters()}
        return optimizer

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, in float32."""
        return {name: self._masters.get(id(weight), weight) for name, weight in super().weights().items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts back what `weights` returned, and rounds it for the weights that compute in bf16."""
        super().load_weights(weights)
        for parameter in self.model.parameters():
            if id(parameter) in self._masters:
                parameter.copy_(self._masters[id(parameter)])

    def widen(self) -> nn.Module:
        """The model with its float32 weights, for good: training is over. Weights without a master are cast."""
        for parameter in self.model.parameters():
            if id(parameter) in self._masters:
                parameter.data = self._masters[id(parameter)].data
        cast_weights(self.model, torch.float32)
        for handle in self._embedding_casts:
            handle.remove()
        return self.model


def _take_special_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model's configuration names the tokenizer's EOS, BOS and padding."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token, known = getattr(tokenizer, name), getattr(config, name, None)
        if token is None or token == known or (isinstance(known, list) and token in known):
            continue
        if name == "eos_token_id" and isinstance(known, list):  # no stop token is dropped
            token = [token, *known]
        setattr(config, name, token)


def collate(features: Sequence[Features], *, pad_token_id: int) -> Batch:
    """B pairs: `input_ids` [B, T] and `lengths` [B, 3] as in models.pairs, `weight` [B, K], the others [B]."""
    rows = [pair["input_ids"] for pair in features]
    batch = {"input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id).long()}
    batch["weight"] = torch.stack([pair["weight"] for pair in features])
    for name in ("lengths", "labels", "margin", "longer"):
        batch[name] = torch.tensor([pair[name] for pair in features])
    batch["label_noise"] = stated_noise(features)
    return batch


def stated_noise(features: Sequence[Features]) -> Tensor:
    """[B]: the share of random labels of each pair's annotator, NaN where it is unknown."""
    return torch.tensor([pair.get("label_noise", math.nan) for pair in features])


def label_noise_of(stated: Tensor, assumed: float) -> Tensor | float:
    """`stated` with the run's share in place of NaN; only that number if all are NaN."""
    unknown = stated.isnan()
    return assumed if unknown.all() else stated.masked_fill(unknown, assumed)


def by_length(features: Sequence[Features]) -> list[int]:
    """The rows from the shortest pair to the longest, so that batches hold little padding."""
    return sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))


def pair_metrics(rewards: Tensor, mu: Tensor, longer: Tensor, *, label_noise: Tensor | float = 0.0) -> dict[str, float]:
    """Loss and accuracy of the members' mean of rewards [N, 2, K] as a prediction of mu [N].

    longer [N]: 1 where response a is longer, 0 where b is, ½ where neither is. All pairs have weight 1 and no margin.
    label_noise: one number for all, or [N].
    """
    a, b = rewards.mean(dim=2).unbind(1)
    return {
        "loss": bradley_terry_loss(a, b, mu, label_noise=label_noise).mean().item(),
        "accuracy": accuracy(a - b, mu),
        "accuracy_length_baseline": accuracy(longer - 0.5, mu),
    }


def accuracy(advantage: Tensor, mu: Tensor) -> float:
    """Share of the N pairs whose preferred response has the advantage (> 0 for a); no advantage counts ½.

    Pairs labelled a tie do not count; ½ if there are no others.
    """
    decided = mu != 0.5
    if not decided.any():
        return 0.5
    agreement = torch.sign(advantage[decided]) * torch.sign(mu[decided] - 0.5)
    return (0.5 + 0.5 * agreement).mean().item()

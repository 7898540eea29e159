"""Reward modelling: a Bradley–Terry model of which of two responses people prefer (Christiano et al. 2017, §2.2.3).

Where it departs from the paper: the ensemble is K heads over one trunk instead of K networks, each with its own
bootstrap of the pairs; the reward of a text is one number, not a sum over steps; L2 is the optimiser's weight decay.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.supervised.checkpoints import fingerprint
from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.algorithms.supervised.reward_trainer import (
    Features,
    RewardTrainer,
    accuracy,
    by_length,
)
from deep_rlhf.errors import DataError, ModelError
from deep_rlhf.models.adapters import add_lora, merged
from deep_rlhf.models.load import disable_dropout, has_reward_head, load_sequence_classifier, load_tokenizer
from deep_rlhf.models.pairs import common_prefix
from deep_rlhf.models.reward import (
    RewardModel,
    ensure_pad_token,
    init_reward_head,
    longest_input,
    render,
    tokenize,
)
from deep_rlhf.models.validation import check_rewards
from deep_rlhf.ops.preference import bootstrap_weights
from deep_rlhf.types import Preference, RowReport

__all__ = ["RewardConfig", "RewardResult", "RewardTrainer", "train_reward_model"]

logger = logging.getLogger(__name__)

TEXTS_PER_CALL = 4096  # of the tokenizer
NORMALISATION_PAIRS = 256  # 512 training responses
OUT_OF_BAG_PAIRS = 1024  # a share 1/e of them is outside each member's bag


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """A trained reward model and its figures on the N held-out pairs that were kept."""

    model: RewardModel
    metrics: dict[str, Any]  # loss, accuracy, accuracy_length_baseline; for an ensemble oob_accuracy, one per member
    history: list[dict[str, float]]  # what the trainer logged
    train_rows: RowReport
    eval_rows: RowReport
    rewards: Tensor  # [N, 2] of responses a and b, mean of the members, not normalised
    mu: Tensor  # [N]


def train_reward_model(
    config: RewardConfig,
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    train_preferences: Sequence[Preference],
    eval_preferences: Sequence[Preference],
    *,
    trust_remote_code: bool = False,
    run_flags: Mapping[str, Any] | None = None,
) -> RewardResult:
    """Fits a reward model to pairs and evaluates it on the held-out ones.

    model: a sequence classifier, by name or as an object, which is changed in place; a model of another kind gets fresh
    heads. tokenizer: the model's own if None; a given object is copied. Pairs with a side longer than `max_length`
    tokens are dropped and counted in the result's RowReports. run_flags: what else the run depends on; a resumed run
    must have the same. Raises ModelError if the model cannot be opened or has another number of heads, DataError if no
    pair is left, and as RewardTrainer.train does.
    """
    config.set_seeds()
    if tokenizer is None or isinstance(tokenizer, str):
        name = tokenizer or (model if isinstance(model, str) else model.config.name_or_path)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    else:
        tokenizer = copy.deepcopy(tokenizer)  # its padding token and truncation side are changed
    if isinstance(model, str):
        model = load_sequence_classifier(model, num_labels=config.ensemble_size, trust_remote_code=trust_remote_code)
    pad_token_id = _prepare(model, tokenizer, config)
    max_length = longest_input(model, tokenizer, config.max_length)
    train, train_rows = pair_features(train_preferences, tokenizer, config, max_length)
    held_out, eval_rows = pair_features(eval_preferences, tokenizer, config, max_length)
    for name, features, rows in (("training", train, train_rows), ("held-out", held_out, eval_rows)):
        if rows.dropped:
            logger.info("%s pairs: %s", name, rows)
        if not features:
            raise DataError(f"No {name} pair is left ({rows}): give more data, or a larger --max_length.")

    evaluated = _sample(held_out, config.eval_samples, config.seed)
    trainer = RewardTrainer(
        with_adapters(model, config) if config.use_peft else model,
        config,
        pad_token_id=pad_token_id,
        train_dataset=train,
        eval_dataset=[evaluated[row] for row in by_length(evaluated)],
        tokenizer=tokenizer,
    )
    trainer.run_flags |= {"training pairs": fingerprint(train), "held-out pairs": fingerprint(held_out)}
    trainer.run_flags |= run_flags or {}
    trainer.train()

    rewards = trainer.rewards(held_out)
    metrics: dict[str, Any] = trainer.metrics(rewards, held_out)
    trainer.log({f"eval_{name}": value for name, value in metrics.items()})
    sample = _sample(train, OUT_OF_BAG_PAIRS if config.ensemble_size > 1 else NORMALISATION_PAIRS, config.seed)
    sample_rewards = trainer.rewards(sample)
    responses = sample_rewards[:NORMALISATION_PAIRS].flatten(0, 1)  # [≤ 512, K]
    if config.ensemble_size > 1:
        metrics["oob_accuracy"] = out_of_bag_accuracy(sample_rewards, sample)
    trained = trainer.widen()
    reward_model = RewardModel(
        merged(trained) if config.use_peft else trained,
        tokenizer,
        template=config.template,
        max_length=max_length,
        mean=responses.mean(dim=0),
        std=responses.std(dim=0, correction=0).clamp(min=1e-6),
        metrics=metrics,
    )
    return RewardResult(
        model=reward_model,
        metrics=metrics,
        history=trainer.history,
        train_rows=train_rows,
        eval_rows=eval_rows,
        rewards=rewards.mean(dim=2),
        mu=torch.tensor([pair["labels"] for pair in held_out]),
    )


def pair_features(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, config: RewardConfig, max_length: int
) -> tuple[list[Features], RowReport]:
    """Tokenises each pair once; pairs with a side longer than `max_length` tokens are dropped and counted.

    `input_ids` and `lengths` are a row of models.pairs; `weight` is [K].
    """
    ids = [pair.id or pair.prompt + pair.a + pair.b for pair in preferences]
    weights = bootstrap_weights(ids, config.ensemble_size)
    features: list[Features] = []
    for start in range(0, len(preferences), TEXTS_PER_CALL // 2):
        pairs = preferences[start : start + TEXTS_PER_CALL // 2]
        texts = [render(config.template, pair.prompt, response) for pair in pairs for response in (pair.a, pair.b)]
        sequences = tokenize(tokenizer, texts)
        for row, pair in enumerate(pairs):
            a, b = sequences[2 * row], sequences[2 * row + 1]
            if max(len(a), len(b)) > max_length:
                continue
            prefix = common_prefix(a, b)
            features.append(
                {
                    "input_ids": torch.cat([a, b[prefix:]]),
                    "lengths": (prefix, len(a) - prefix, len(b) - prefix),
                    "labels": float(pair.mu),
                    "margin": float(pair.margin),
                    "weight": pair.weight * weights[start + row],
                    "longer": 0.5 + 0.5 * ((len(pair.a) > len(pair.b)) - (len(pair.a) < len(pair.b))),
                }
            )
            if pair.label_noise is not None:
                features[-1]["label_noise"] = float(pair.label_noise)
    dropped = len(preferences) - len(features)
    return features, RowReport(len(preferences), len(features), {"too long": dropped} if dropped else {})


def out_of_bag_accuracy(rewards: Tensor, features: Sequence[Features]) -> list[float]:
    """Each member's accuracy on the pairs outside its bag (weight 0), from rewards [N, 2, K].

    Its head did not train on them, but the shared trunk did, through other members: the figure is optimistic.
    """
    mu = torch.tensor([pair["labels"] for pair in features])
    outside = torch.stack([pair["weight"] for pair in features]) == 0  # [N, K]
    advantage = rewards[:, 0] - rewards[:, 1]
    return [accuracy(advantage[rows, member], mu[rows]) for member, rows in enumerate(outside.unbind(1))]


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RewardConfig) -> int:
    """Gives the model a reward head and padding; returns the id of the padding token."""
    if model.config.num_labels != config.ensemble_size:
        raise ModelError(
            f"The model has {model.config.num_labels} heads: --ensemble_size={config.ensemble_size} differs."
        )
    ensure_pad_token(model, tokenizer)
    if config.disable_dropout:
        disable_dropout(model)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # texts are never continued
    check_rewards(model, tokenizer, model.name_or_path or model.config.model_type)
    if not has_reward_head(model.config):
        init_reward_head(model)
    return tokenizer.pad_token_id


def with_adapters(model: PreTrainedModel, config: RewardConfig) -> Any:
    """LoRA adapters on the trunk; the layers above it are new and all their weights are trained."""
    above = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    head = [name for name, module in above if next(module.parameters(), None) is not None]
    return add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type="SEQ_CLS", modules_to_save=head)


def _sample(features: list[Features], count: int, seed: int) -> list[Features]:
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [features[row] for row in rows]

"""Reward modelling: a Bradley–Terry model of which of two answers people prefer (Christiano et al. 2017, §2.2.3).

Where it departs from the paper: the ensemble is K heads over one trunk instead of K networks, each with its own
bootstrap of the pairs; the reward of a text is one number, not a sum over steps; L2 is the optimiser's weight decay.
"""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deep_rlhf.algorithms.supervised.reward_config import RewardConfig
from deep_rlhf.algorithms.supervised.reward_trainer import (
    Features,
    RewardTrainer,
    accuracy,
    by_length,
    label_noise_of,
    pair_metrics,
    told_noise,
)
from deep_rlhf.errors import UserError
from deep_rlhf.models.adapters import add_lora, merged
from deep_rlhf.models.load import disable_dropout, load_sequence_classifier, load_tokenizer
from deep_rlhf.models.pairs import common_prefix
from deep_rlhf.models.reward import (
    RewardModel,
    ensure_pad_token,
    has_reward_head,
    init_reward_head,
    longest_input,
    render,
    tokenize,
)
from deep_rlhf.ops.preference import bootstrap_weights
from deep_rlhf.types import Preference, RowReport

__all__ = ["RewardConfig", "RewardResult", "RewardTrainer", "train_reward_model"]

logger = logging.getLogger(__name__)

TEXTS_PER_CALL = 4096  # of the tokenizer
NORMALISATION_PAIRS = 256  # 512 training answers
OUT_OF_BAG_PAIRS = 1024  # of them a share 1/e is out of each member's bag


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """What training gives: the model, and how it does on the N held-out pairs that were kept."""

    model: RewardModel
    metrics: dict[str, Any]  # loss, accuracy, accuracy_length_baseline; an ensemble's oob_accuracy, one per member
    history: list[dict[str, float]]  # what the trainer logged
    train_rows: RowReport
    eval_rows: RowReport
    rewards: Tensor  # [N, 2] of answers a and b, mean of the members, not normalised
    mu: Tensor  # [N]


def train_reward_model(
    config: RewardConfig,
    model: Any,
    tokenizer: Any,
    train_preferences: Sequence[Preference],
    eval_preferences: Sequence[Preference],
    *,
    trust_remote_code: bool = False,
    run_flags: Mapping[str, Any] | None = None,
) -> RewardResult:
    """Fits a reward model to pairs and evaluates it on the held-out ones.

    model: a sequence classifier, by name or as an object, which is changed in place; a checkpoint that is none yet gets
    fresh heads. tokenizer: its own if None; a given object is copied. Pairs of which a side exceeds `max_length` tokens
    are dropped and counted in the result's RowReports. run_flags: what else the run depends on, compared with the rest
    when it is resumed. Raises UserError for what cannot be opened, when no pair is left, and as ResumableTrainer does.
    """
    set_seed(config.seed)
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.config.name_or_path
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    else:
        tokenizer = copy.deepcopy(tokenizer)  # it gets a padding token, and another side to truncate
    if isinstance(model, str):
        model = load_sequence_classifier(model, num_labels=config.ensemble_size, trust_remote_code=trust_remote_code)
    _prepare(model, tokenizer, config)
    max_length = longest_input(model, tokenizer, config.max_length)
    train, train_rows = pair_features(train_preferences, tokenizer, config, max_length)
    held_out, eval_rows = pair_features(eval_preferences, tokenizer, config, max_length)
    for name, features, rows in (("training", train, train_rows), ("held-out", held_out, eval_rows)):
        if rows.dropped:
            logger.info("%s pairs: %s", name, rows)
        if not features:
            raise UserError(f"No {name} pair is left ({rows}): give more data, or a larger --max_length.")

    evaluated = _sample(held_out, config.eval_samples, config.seed)
    trainer = RewardTrainer(
        with_adapters(model, config) if config.use_peft else model,
        config,
        pad_token_id=tokenizer.pad_token_id,
        train_dataset=train,
        eval_dataset=[evaluated[row] for row in by_length(evaluated)],
        processing_class=tokenizer,
    )
    trainer.run_flags |= {"training pairs": _fingerprint(train), "held-out pairs": _fingerprint(held_out)}
    trainer.run_flags |= run_flags or {}
    trainer.train(resume_from_checkpoint=config.resume or config.resume_from_checkpoint)

    rewards = trainer.rewards(held_out)
    mu, longer = (torch.tensor([pair[name] for pair in held_out]) for name in ("labels", "longer"))
    noise = label_noise_of(told_noise(held_out), config.label_noise)
    metrics: dict[str, Any] = pair_metrics(rewards, mu, longer, label_noise=noise)
    trainer.log({f"eval_{name}": value for name, value in metrics.items()})
    sample = _sample(train, OUT_OF_BAG_PAIRS if config.ensemble_size > 1 else NORMALISATION_PAIRS, config.seed)
    seen = trainer.rewards(sample)
    answers = seen[:NORMALISATION_PAIRS].flatten(0, 1)  # [≤ 512, K]
    if config.ensemble_size > 1:
        metrics["oob_accuracy"] = out_of_bag_accuracy(seen, sample)
    trained = trainer.widen()
    reward_model = RewardModel(
        merged(trained) if config.use_peft else trained,
        tokenizer,
        template=config.template,
        max_length=max_length,
        mean=answers.mean(dim=0),
        std=answers.std(dim=0, correction=0).clamp(min=1e-6),
        metrics=metrics,
    )
    return RewardResult(
        model=reward_model,
        metrics=metrics,
        history=trainer.state.log_history,
        train_rows=train_rows,
        eval_rows=eval_rows,
        rewards=rewards.mean(dim=2),
        mu=mu,
    )


def pair_features(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, config: RewardConfig, max_length: int
) -> tuple[list[Features], RowReport]:
    """Each pair tokenised once; those of which a side exceeds `max_length` tokens are left out and counted.

    `input_ids` and `lengths` are a row of models.pairs; `weight` is [K].
    """
    ids = [pair.id or pair.prompt + pair.a + pair.b for pair in preferences]
    weights = bootstrap_weights(ids, config.ensemble_size)
    features: list[Features] = []
    for start in range(0, len(preferences), TEXTS_PER_CALL // 2):
        pairs = preferences[start : start + TEXTS_PER_CALL // 2]
        texts = [render(config.template, pair.prompt, answer) for pair in pairs for answer in (pair.a, pair.b)]
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
            if pair.label_noise is not None:  # no entry otherwise: runs from before there was one can be resumed
                features[-1]["label_noise"] = float(pair.label_noise)
    dropped = len(preferences) - len(features)
    return features, RowReport(len(preferences), len(features), {"too long": dropped} if dropped else {})


def out_of_bag_accuracy(rewards: Tensor, features: Sequence[Features]) -> list[float]:
    """Each member's accuracy on the pairs outside its bag (weight 0), from rewards [N, 2, K].

    Its head never saw them; the shared trunk did, through other members, so the figure is optimistic.
    """
    mu = torch.tensor([pair["labels"] for pair in features])
    outside = torch.stack([pair["weight"] for pair in features]) == 0  # [N, K]
    advantage = rewards[:, 0] - rewards[:, 1]
    return [accuracy(advantage[rows, member], mu[rows]) for member, rows in enumerate(outside.unbind(1))]


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RewardConfig) -> None:
    if model.config.num_labels != config.ensemble_size:
        raise UserError(
            f"The model has {model.config.num_labels} heads: --ensemble_size={config.ensemble_size} differs."
        )
    ensure_pad_token(model, tokenizer)
    if config.disable_dropout:
        disable_dropout(model)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # keys and values of a text that is never continued
    if not has_reward_head(model.config):
        init_reward_head(model)


def with_adapters(model: PreTrainedModel, config: RewardConfig) -> Any:
    """LoRA on the trunk; what lies above it is new, and trained whole."""
    above = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    head = [name for name, module in above if next(module.parameters(), None) is not None]
    return add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type="SEQ_CLS", modules_to_save=head)


def _fingerprint(features: Sequence[Features]) -> str:
    digest = hashlib.sha256()
    for pair in features:
        for name, value in sorted(pair.items()):
            digest.update(
                name.encode() + (value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
            )
    return f"{len(features)} with digest {digest.hexdigest()[:12]}"


def _sample(features: list[Features], count: int, seed: int) -> list[Features]:
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [features[row] for row in rows]

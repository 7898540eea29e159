"""Reward modelling: a Bradley–Terry model of which of two answers people prefer (Christiano et al. 2017, §2.2.3).

Where it departs from the paper: the ensemble is K heads over one trunk instead of K networks, each with its own
bootstrap of the pairs; the reward of a text is one number, not a sum over steps; L2 is the optimiser's weight decay.
"""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from deep_rlhf.algorithms.resumable import ResumableTrainer
from deep_rlhf.data.templates import get_template
from deep_rlhf.models.adapters import add_lora, merged
from deep_rlhf.models.load import disable_dropout, load_sequence_classifier, load_tokenizer
from deep_rlhf.models.reward import (
    RewardModel,
    ensure_pad_token,
    has_reward_head,
    init_reward_head,
    longest_input,
    pad,
    render,
    tokenize,
)
from deep_rlhf.ops.preference import bootstrap_weights, bradley_terry_loss
from deep_rlhf.types import Preference, RowReport, UserError, check_seed

logger = logging.getLogger(__name__)

TEXTS_PER_CALL = 4096  # of the tokenizer
NORMALISATION_PAIRS = 256  # 512 training answers
OUT_OF_BAG_PAIRS = 1024  # of them a share 1/e is out of each member's bag

Features = dict[str, Any]


@dataclass
class RewardConfig(TrainingArguments):
    """Every flag of transformers.TrainingArguments, and those of the reward model.

    One epoch, for a second over-fits (Stiennon et al. 2020). Evaluated every `eval_steps` updates, `logging_steps` if
    not given; the checkpoint with the lowest held-out loss is kept. With save_strategy="best" there is a checkpoint
    every ten minutes besides, for `resume`. Raises UserError for a value out of range.
    """

    output_dir: str = field(default="outputs/reward", metadata={"help": "Where the reward model is written."})
    learning_rate: float = field(default=1.41e-5, metadata={"help": "The initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="best", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many of the newest checkpoints to keep; the best are kept besides."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest whole checkpoint in output_dir."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Keep the best evaluated model, not the last."}
    )
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "By which the best is chosen."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Accepted, without effect."})

    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer; longer pairs are dropped."})
    eval_samples: int = field(
        default=200, metadata={"help": "Held-out pairs evaluated during training; the final evaluation takes all."}
    )
    ensemble_size: int = field(default=1, metadata={"help": "Heads, each trained on its own bootstrap of the pairs."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of labels assumed to be random, for example 0.1."})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the squared sum of a pair's rewards, which keeps them near 0."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters; the saved model has them merged."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of the adapters, divided by lora_r."})
    template: str = field(default="hh", metadata={"help": "How a dialogue is written: hh or plain."})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, smallest in (("max_length", 2), ("eval_samples", 1), ("ensemble_size", 1), ("lora_r", 1)):
            if getattr(self, name) < smallest:
                raise UserError(f"--{name} must be at least {smallest}, not {getattr(self, name)}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        resume = self.resume_from_checkpoint
        if isinstance(resume, str) and not Path(resume, "trainer_state.json").exists():
            raise UserError(f"--resume_from_checkpoint '{resume}' is no checkpoint: it has no trainer_state.json.")
        if self.resume and (resume or self.save_only_model):
            other = "--resume_from_checkpoint" if resume else "--save_only_model"
            raise UserError(f"--resume does not go with {other}: leave out one of them.")
        if not 0.0 <= self.label_noise < 1.0:
            raise UserError(f"--label_noise is a share of the labels: at least 0 and below 1, not {self.label_noise}.")
        get_template(self.template)
        self.remove_unused_columns = False  # the collator reads columns that no model's forward names
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it only warns there


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


class RewardTrainer(ResumableTrainer):
    """transformers.Trainer with the Bradley–Terry loss, averaged over the global number of pairs of an update."""

    def __init__(self, model: nn.Module, args: RewardConfig, *, pad_token_id: int, **options: Any) -> None:
        super().__init__(
            model,
            args,
            data_collator=partial(collate, pad_token_id=pad_token_id),
            compute_metrics=partial(_metrics_of_prediction, label_noise=args.label_noise),
            **options,
        )
        self.model_accepts_loss_kwargs = True  # so that the pairs of all micro-batches and processes are counted
        self.label_names = ["labels", "longer"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Σ over pairs of the weighted loss, averaged over members, / the global number of pairs of the update.

        With `center_rewards_coefficient` c, c (r_a + r_b)² is added per pair (Eisenstein et al. 2023).
        """
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]  # [B, 2, L]
        logits = model(input_ids=input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1)).logits
        rewards = logits.float().unflatten(0, (-1, 2))  # [B, 2, K]
        a, b = rewards.unbind(1)
        mu, margin = inputs["labels"][:, None].expand_as(a), inputs["margin"][:, None]
        loss = inputs["weight"] * bradley_terry_loss(a, b, mu, margin=margin, label_noise=self.args.label_noise)
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
        order = _by_length(features)
        rewards = torch.empty(len(features), 2, self.model.config.num_labels)
        rewards[order] = torch.from_numpy(self.predict([features[row] for row in order]).predictions)
        return rewards


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
        _with_adapters(model, config) if config.use_peft else model,
        config,
        pad_token_id=tokenizer.pad_token_id,
        train_dataset=train,
        eval_dataset=[evaluated[row] for row in _by_length(evaluated)],
        processing_class=tokenizer,
    )
    trainer.run_flags |= {"training pairs": _fingerprint(train), "held-out pairs": _fingerprint(held_out)}
    trainer.run_flags |= run_flags or {}
    trainer.train(resume_from_checkpoint=config.resume or config.resume_from_checkpoint)

    rewards = trainer.rewards(held_out)
    mu, longer = (torch.tensor([pair[name] for pair in held_out]) for name in ("labels", "longer"))
    metrics: dict[str, Any] = pair_metrics(rewards, mu, longer, label_noise=config.label_noise)
    trainer.log({f"eval_{name}": value for name, value in metrics.items()})
    sample = _sample(train, OUT_OF_BAG_PAIRS if config.ensemble_size > 1 else NORMALISATION_PAIRS, config.seed)
    seen = trainer.rewards(sample)
    answers = seen[:NORMALISATION_PAIRS].flatten(0, 1)  # [≤ 512, K]
    if config.ensemble_size > 1:
        metrics["oob_accuracy"] = out_of_bag_accuracy(seen, sample)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
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

    `input_ids` holds the ids of a then b, `length_a` says where b begins; `weight` is [K].
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
            features.append(
                {
                    "input_ids": torch.cat([a, b]),
                    "length_a": len(a),
                    "labels": float(pair.mu),
                    "margin": float(pair.margin),
                    "weight": pair.weight * weights[start + row],
                    "longer": 0.5 + 0.5 * ((len(pair.a) > len(pair.b)) - (len(pair.a) < len(pair.b))),
                }
            )
    dropped = len(preferences) - len(features)
    return features, RowReport(len(preferences), len(features), {"too long": dropped} if dropped else {})


def collate(features: Sequence[Features], *, pad_token_id: int) -> dict[str, Tensor]:
    """One batch of B pairs: `input_ids` and `attention_mask` [B, 2, L], `weight` [B, K], the others [B]."""
    sides = [side for pair in features for side in pair["input_ids"].tensor_split([pair["length_a"]])]
    batch = {name: ids.unflatten(0, (-1, 2)) for name, ids in pad(sides, pad_token_id).items()}
    batch["weight"] = torch.stack([pair["weight"] for pair in features])
    for name in ("labels", "margin", "longer"):
        batch[name] = torch.tensor([pair[name] for pair in features])
    return batch


def pair_metrics(rewards: Tensor, mu: Tensor, longer: Tensor, *, label_noise: float = 0.0) -> dict[str, float]:
    """How well rewards [N, 2, K] predict mu [N]: of the members' mean, the loss and the accuracy.

    longer [N]: 1 where a is the longer answer, 0 where b is, ½ where neither. All pairs count alike, without margin.
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


def out_of_bag_accuracy(rewards: Tensor, features: Sequence[Features]) -> list[float]:
    """Each member's accuracy on the pairs outside its bag (weight 0), from rewards [N, 2, K].

    Its head never saw them; the shared trunk did, through other members, so the figure is optimistic.
    """
    mu = torch.tensor([pair["labels"] for pair in features])
    outside = torch.stack([pair["weight"] for pair in features]) == 0  # [N, K]
    advantage = rewards[:, 0] - rewards[:, 1]
    return [accuracy(advantage[rows, member], mu[rows]) for member, rows in enumerate(outside.unbind(1))]


def _metrics_of_prediction(prediction: EvalPrediction, *, label_noise: float) -> dict[str, float]:
    mu, longer = prediction.label_ids
    return pair_metrics(*map(torch.from_numpy, (prediction.predictions, mu, longer)), label_noise=label_noise)


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


def _with_adapters(model: PreTrainedModel, config: RewardConfig) -> Any:
    """LoRA on the trunk; what lies above it is new, and trained whole."""
    above = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    head = [name for name, module in above if next(module.parameters(), None) is not None]
    return add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type="SEQ_CLS", modules_to_save=head)


def _by_length(features: Sequence[Features]) -> list[int]:
    """The order in which batches hold little padding."""
    return sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))


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

"""Direct preference optimisation: a policy from pairs alone, without a reward model or samples (Rafailov et al. 2023).

The loss is the reward model's, with β log(π/π_ref) of a whole answer (EOS included) in the reward's place; its optimum
is PPO's, π_ref exp(r/β), as far as the pairs tell r. The reference is the model as it is given: its log-probabilities
are computed once before training, so no second model is held. Where it departs from the paper: AdamW instead of
RMSprop, and pairs may be ties or shares of votes.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from deep_rlhf.algorithms.supervised.reward_trainer import label_noise_of, told_noise
from deep_rlhf.data.chat import get_template
from deep_rlhf.errors import UserError
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.models.policy import Policy
from deep_rlhf.models.reward import longest_input
from deep_rlhf.ops.preference import dpo_loss
from deep_rlhf.types import Preference, RowReport, check_seed

logger = logging.getLogger(__name__)

Features = dict[str, Any]


@dataclass
class DPOConfig(TrainingArguments):
    """Every flag of transformers.TrainingArguments, and those of DPO.

    Evaluated every `eval_steps` updates, `logging_steps` if not given. Raises UserError for a value out of range.
    """

    output_dir: str = field(default="outputs/dpo", metadata={"help": "Where the policy and its figures are written."})
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Accepted, without effect."})

    beta: float = field(default=0.1, metadata={"help": "β, how much it costs to move away from the reference."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of labels assumed to be random, for example 0.1."})
    max_length: int = field(default=512, metadata={"help": "Tokens of prompt and answer; longer pairs are dropped."})
    eval_samples: int = field(
        default=200, metadata={"help": "Held-out pairs evaluated during training; the final evaluation takes all."}
    )
    use_seq2seq: bool = field(default=False, metadata={"help": "The policy is an encoder-decoder such as T5."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters; the saved model has them merged."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of the adapters, divided by lora_r."})
    template: str = field(default="hh", metadata={"help": "How a dialogue is written: hh or plain."})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not self.beta > 0:
            raise UserError(f"--beta must be above 0, not {self.beta}.")
        if not 0.0 <= self.label_noise < 1.0:
            raise UserError(f"--label_noise is a share of the labels: at least 0 and below 1, not {self.label_noise}.")
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor is about tokens, and DPO compares answers: use --label_noise.")
        for name, smallest in (
            ("max_length", 2),
            ("eval_samples", 1),
            ("lora_r", 1),
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
        ):
            if getattr(self, name) < smallest:
                raise UserError(f"--{name} must be at least {smallest}, not {getattr(self, name)}.")
        resume = self.resume_from_checkpoint
        if isinstance(resume, str) and not Path(resume, "trainer_state.json").exists():
            raise UserError(f"--resume_from_checkpoint '{resume}' is no checkpoint: it has no trainer_state.json.")
        get_template(self.template)
        self.remove_unused_columns = False  # the collator reads columns that no model's forward names
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it only warns there


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOResult:
    """What training gives: the policy, and how its implicit reward does on all held-out pairs that were kept."""

    model: PreTrainedModel  # plain transformers, adapters merged in
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, float]  # those of `dpo_metrics`
    history: list[dict[str, float]]  # what the trainer logged
    train_rows: RowReport
    eval_rows: RowReport


class AnswerPolicy(Policy):
    """A policy whose forward gives the log-probability of whole answers: what a wrapper for several devices calls."""

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """prompt_* [B, P] and answer_* [B, 2, R], the answers a and b of each prompt -> [B, 2] in nats."""
        prompts = prompt_ids.repeat_interleave(2, 0), prompt_mask.repeat_interleave(2, 0)
        ids, mask = answer_ids.flatten(0, 1), answer_mask.flatten(0, 1)
        logprobs = self.logprobs(self.states(*prompts, ids, mask), ids, mask, temperature=1.0)
        return logprobs.sum(1).unflatten(0, (-1, 2))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """What the Trainer calls for the flag `gradient_checkpointing`."""
        self.model.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same in older transformers."""
        self.model.gradient_checkpointing_enable(**options)


class DPOTrainer(Trainer):
    """transformers.Trainer with the DPO loss, averaged over the global number of pairs of an update."""

    model: Any  # an AnswerPolicy

    def __init__(self, policy: AnswerPolicy, args: DPOConfig, **options: Any) -> None:
        super().__init__(
            policy,
            args,
            data_collator=partial(collate, prompts_left=not policy.is_seq2seq),
            compute_metrics=partial(_metrics_of_prediction, beta=args.beta, label_noise=args.label_noise),
            **options,
        )
        self.model_accepts_loss_kwargs = True  # so that the pairs of all micro-batches and processes are counted
        self.label_names = ["labels", "ref_logprobs", "label_noise"]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Σ over pairs of the weighted loss / the global number of pairs of the update."""
        logprobs = model(
            inputs["prompt_ids"], inputs["prompt_mask"], inputs["answer_ids"], inputs["answer_mask"]
        )  # [B, 2]
        noise = label_noise_of(inputs["label_noise"], self.args.label_noise)
        losses, _, _ = _losses(logprobs, inputs["ref_logprobs"], inputs["labels"], self.args.beta, noise)
        total = (inputs["weight"] * losses).sum()
        if num_items_in_batch is None:
            mean = total / len(losses)
        else:
            # Gradients are averaged over processes, but this sum is divided by the pairs of all of them.
            shares = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            mean = shares * total / num_items_in_batch
        return (mean, {"logprobs": logprobs}) if return_outputs else mean

    def logprobs(self, features: Sequence[Features]) -> Tensor:
        """The log-probabilities [N, 2] of every pair's answers under the model as it is now, float32 on the CPU."""
        order = _by_length(features)
        logprobs = torch.empty(len(features), 2)
        logprobs[order] = torch.from_numpy(self.predict([features[row] for row in order]).predictions)
        return logprobs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self._unwrapped():
            super()._save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._unwrapped():
            super()._load_from_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._unwrapped():
            super()._load_best_model()

    @contextmanager
    def _unwrapped(self) -> Iterator[None]:
        """Checkpoints are the language model's (or its adapters'), which transformers knows how to write and read."""
        policy, self.model = self.model, self.model.model
        try:
            yield
        finally:
            self.model = policy


def train_dpo(
    config: DPOConfig,
    model: Any,
    tokenizer: Any,
    train_preferences: Sequence[Preference],
    eval_preferences: Sequence[Preference],
    *,
    trust_remote_code: bool = False,
) -> DPOResult:
    """Trains a policy on pairs and evaluates its implicit reward on the held-out ones.

    model: a language model, by name or as an object, which is changed in place. tokenizer: its own if None. Pairs of
    which a side exceeds `max_length` tokens, or whose prompt is empty, are dropped and counted in the result's
    RowReports. Raises UserError for what cannot be opened, and when no pair is left.
    """
    set_seed(config.seed)
    if tokenizer is None:
        tokenizer = model if isinstance(model, str) else model.config.name_or_path
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if isinstance(model, str):
        model = load_language_model(model, seq2seq=config.use_seq2seq, trust_remote_code=trust_remote_code)
    max_length = longest_input(model, tokenizer, config.max_length)
    train, train_rows = pair_features(train_preferences, tokenizer, config.template, max_length)
    held_out, eval_rows = pair_features(eval_preferences, tokenizer, config.template, max_length)
    for name, features, rows in (("training", train, train_rows), ("held-out", held_out, eval_rows)):
        if rows.dropped:
            logger.info("%s pairs: %s", name, rows)
        if not features:
            raise UserError(f"No {name} pair is left ({rows}): give more data, or a larger --max_length.")

    sample = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(config.seed))
    evaluated = [held_out[row] for row in sample[: config.eval_samples].tolist()]
    # A trainer of its own, since accelerate takes a module that it prepared for evaluation as prepared for training.
    reference = DPOTrainer(AnswerPolicy(model), config, eval_dataset=held_out)
    for features in (train, held_out):
        for pair, ref_logprobs in zip(features, reference.logprobs(features), strict=True):
            pair["ref_logprobs"] = ref_logprobs
    policy = AnswerPolicy(_with_adapters(model, config) if config.use_peft else model)
    trainer = DPOTrainer(
        policy,
        config,
        train_dataset=train,
        eval_dataset=[evaluated[row] for row in _by_length(evaluated)],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)

    ref_logprobs = torch.stack([pair["ref_logprobs"] for pair in held_out])
    mu = torch.tensor([pair["labels"] for pair in held_out])
    noise = label_noise_of(told_noise(held_out), config.label_noise)
    metrics = dpo_metrics(trainer.logprobs(held_out), ref_logprobs, mu, beta=config.beta, label_noise=noise)
    trainer.log({f"eval_{name}": value for name, value in metrics.items()})
    return DPOResult(
        model=policy.plain_model(),
        tokenizer=tokenizer,
        metrics=metrics,
        history=trainer.state.log_history,
        train_rows=train_rows,
        eval_rows=eval_rows,
    )


def pair_features(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, template: str, max_length: int
) -> tuple[list[Features], RowReport]:
    """Each pair tokenised once, answers closed with EOS; those that cannot be used are left out and counted."""
    form = get_template(template)
    features: list[Features] = []
    dropped = {"too long": 0, "empty prompt": 0}
    if preferences:
        texts = [form.response(answer) for pair in preferences for answer in (pair.a, pair.b)]
        prompts = tokenizer([form.prompt(pair.prompt) for pair in preferences], verbose=False).input_ids
        answers = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for row, (pair, prompt) in enumerate(zip(preferences, prompts, strict=True)):
            a, b = ([*answer, tokenizer.eos_token_id] for answer in answers[2 * row : 2 * row + 2])
            if len(prompt) + max(len(a), len(b)) > max_length:
                dropped["too long"] += 1
            elif not prompt:
                dropped["empty prompt"] += 1
            else:
                ids = [torch.tensor(tokens, dtype=torch.int32) for tokens in (prompt, a, b)]
                numbers = {"labels": float(pair.mu), "weight": float(pair.weight)}
                if pair.label_noise is not None:
                    numbers["label_noise"] = float(pair.label_noise)
                features.append({"ids": ids, "ref_logprobs": torch.zeros(2), **numbers})
    reasons = {reason: count for reason, count in dropped.items() if count}
    return features, RowReport(len(preferences), len(features), reasons)


def collate(features: Sequence[Features], *, prompts_left: bool) -> dict[str, Tensor]:
    """One batch of B pairs: `prompt_*` [B, P], `answer_*` [B, 2, R], `ref_logprobs` [B, 2], the others [B].

    Prompts are padded on the left for a decoder, whose answers must follow directly, and on the right for an encoder.
    """
    prompt_ids, prompt_mask = _padded([pair["ids"][0] for pair in features], left=prompts_left)
    answer_ids, answer_mask = _padded([ids for pair in features for ids in pair["ids"][1:]], left=False)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "answer_ids": answer_ids.unflatten(0, (-1, 2)),
        "answer_mask": answer_mask.unflatten(0, (-1, 2)),
        "ref_logprobs": torch.stack([pair["ref_logprobs"] for pair in features]),
        "labels": torch.tensor([pair["labels"] for pair in features]),
        "weight": torch.tensor([pair["weight"] for pair in features]),
        "label_noise": told_noise(features),
    }


def dpo_metrics(
    logprobs: Tensor, ref_logprobs: Tensor, mu: Tensor, *, beta: float, label_noise: Tensor | float = 0.0
) -> dict[str, float]:
    """How well the implicit reward, from log-probabilities [N, 2] of answers a and b, predicts mu [N].

    `loss` is the mean over all pairs; `reward_chosen`, `reward_rejected`, their difference `margin`, and `accuracy`,
    the share of margins above 0 (0 counts ½), are over the pairs that are no tie, and NaN if there is none.
    """
    losses, a, b = _losses(logprobs, ref_logprobs, mu, beta, label_noise)
    decided = mu != 0.5
    chosen, rejected = (torch.where(mu > 0.5, *sides)[decided] for sides in ((a, b), (b, a)))
    return {
        "loss": losses.mean().item(),
        "accuracy": (0.5 + 0.5 * torch.sign(chosen - rejected)).mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "reward_chosen": chosen.mean().item(),
        "reward_rejected": rejected.mean().item(),
    }


def _losses(
    logprobs: Tensor, ref_logprobs: Tensor, mu: Tensor, beta: float, label_noise: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    (a, b), (ref_a, ref_b) = logprobs.unbind(1), ref_logprobs.unbind(1)
    return dpo_loss(a, b, ref_a, ref_b, mu, beta=beta, label_noise=label_noise)


def _metrics_of_prediction(prediction: EvalPrediction, *, beta: float, label_noise: float) -> dict[str, float]:
    logprobs, mu, ref_logprobs, told = map(torch.from_numpy, (prediction.predictions, *prediction.label_ids))
    return dpo_metrics(logprobs, ref_logprobs, mu, beta=beta, label_noise=label_noise_of(told, label_noise))


def _with_adapters(model: PreTrainedModel, config: DPOConfig) -> Any:
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type=task_type)


def _by_length(features: Sequence[Features]) -> list[int]:
    """The order in which batches hold little padding."""
    return sorted(range(len(features)), key=lambda row: sum(len(ids) for ids in features[row]["ids"]))


def _padded(sequences: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [n, L] int64 and mask [n, L] bool. The filling is id 0: the mask tells what is real."""
    width = max(len(ids) for ids in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, tokens in enumerate(sequences):
        columns = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, columns] = tokens.long()
        mask[row, columns] = True
    return ids, mask

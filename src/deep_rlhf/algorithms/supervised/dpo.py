"""Direct preference optimisation: a policy from pairs alone, without a reward model or samples (Rafailov et al. 2023).

The loss is the reward model's, with β log(π/π_ref) of a whole response (EOS included) in place of the reward; its
optimum is that of PPO, π_ref exp(r/β), as far as the pairs determine r. The reference is the model as it is given: its
log-probabilities are computed once before training, so no second model is held. Where it departs from the paper: AdamW
instead of RMSprop, and pairs may be ties or shares of votes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.algorithms.supervised.batches import Batch
from deep_rlhf.algorithms.supervised.checkpoints import fingerprint
from deep_rlhf.algorithms.supervised.config import SupervisedConfig
from deep_rlhf.algorithms.supervised.loop import SupervisedTrainer
from deep_rlhf.algorithms.supervised.reward_trainer import label_noise_of, stated_noise
from deep_rlhf.data.chat import get_template
from deep_rlhf.errors import ConfigError, DataError
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.models.policy import Policy
from deep_rlhf.models.reward import longest_input
from deep_rlhf.models.validation import check_vocabulary, require_eos
from deep_rlhf.ops.preference import dpo_loss
from deep_rlhf.settings import setting
from deep_rlhf.types import Preference, RowReport

logger = logging.getLogger(__name__)

Features = dict[str, Any]


@dataclass
class DPOConfig(SupervisedConfig):
    """Every flag of transformers.TrainingArguments, and those of DPO.

    The policy is evaluated every `eval_steps` updates (default: `logging_steps`). Raises ConfigError for a value out of
    bounds.
    """

    FIGURES = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")

    output_dir: str = field(default="outputs/dpo", metadata={"help": "Folder for the policy and its figures."})
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Updates between two log entries."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Number of newest checkpoints to keep, besides the best."}
    )

    beta: float = setting(0.1, "Cost β of moving away from the reference model.", above=0.0, most=1e6)
    label_noise: float = setting(0.0, "Share of labels assumed to be random, for example 0.1.", least=0.0, below=1.0)
    max_length: int = setting(512, "Tokens of prompt and response; longer pairs are dropped.", least=2)
    eval_samples: int = setting(
        200, "Held-out pairs evaluated during training; the final evaluation takes all.", least=1
    )
    use_seq2seq: bool = field(default=False, metadata={"help": "The policy is an encoder-decoder such as T5."})
    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters; they are merged into the saved model."}
    )
    lora_r: int = setting(16, "Rank of the adapters.", least=1, most=2**16)
    lora_alpha: float = setting(16.0, "Scale of the adapters, divided by lora_r.", above=0, most=1e6)
    template: str = field(default="hh", metadata={"help": "Format of a dialogue: hh or plain."})

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ConfigError("--label_smoothing_factor smooths tokens, but DPO compares responses: use --label_noise.")
        get_template(self.template)
        super().__post_init__()


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOResult:
    """A trained policy and the figures of its implicit reward on all held-out pairs that were kept."""

    model: PreTrainedModel  # plain transformers, adapters merged in
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, float]  # those of `dpo_metrics`
    history: list[dict[str, float]]  # what the trainer logged
    train_rows: RowReport
    eval_rows: RowReport


class ResponsePolicy(Policy):
    """A policy whose forward pass gives the log-probability of whole responses."""

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """prompt_* [B, P] and response_* [B, 2, R], responses a and b of each prompt -> [B, 2] in nats."""
        prompts = prompt_ids.repeat_interleave(2, 0), prompt_mask.repeat_interleave(2, 0)
        ids, mask = response_ids.flatten(0, 1), response_mask.flatten(0, 1)
        logprobs = self.logprobs(self.states(*prompts, ids, mask), ids, mask, temperature=1.0)
        return logprobs.sum(1).unflatten(0, (-1, 2))


class DPOTrainer(SupervisedTrainer):
    """Trains a policy on `pair_features`; the DPO loss is averaged over all pairs of an update."""

    config: DPOConfig
    model: ResponsePolicy

    def network(self) -> Any:
        """The language model inside the policy."""
        return self.model.model

    def collate(self, examples: list[Features]) -> Batch:
        """As the function `collate`."""
        return collate(examples, prompts_left=not self.model.is_seq2seq)

    def outputs(self, batch: Batch) -> Tensor:
        """The log-probabilities [B, 2] of both responses."""
        return self.model(batch["prompt_ids"], batch["prompt_mask"], batch["response_ids"], batch["response_mask"])

    def loss(self, batch: Batch) -> Tensor:
        """Σ over pairs of the weighted loss."""
        noise = label_noise_of(batch["label_noise"], self.config.label_noise)
        losses, _, _ = _losses(self.outputs(batch), batch["ref_logprobs"], batch["labels"], self.config.beta, noise)
        return (batch["weight"] * losses).sum()

    def metrics(self, outputs: Tensor, examples: Sequence[Features]) -> dict[str, float]:
        """As `dpo_metrics`."""
        ref_logprobs = torch.stack([pair["ref_logprobs"] for pair in examples])
        mu = torch.tensor([pair["labels"] for pair in examples])
        noise = label_noise_of(stated_noise(examples), self.config.label_noise)
        return dpo_metrics(outputs, ref_logprobs, mu, beta=self.config.beta, label_noise=noise)

    def logprobs(self, features: Sequence[Features]) -> Tensor:
        """The log-probabilities [N, 2] of every pair's responses under the model as it is now, float32 on the CPU."""
        order = _by_length(features)
        logprobs = torch.empty(len(features), 2)
        logprobs[order] = self.predict([features[row] for row in order])
        return logprobs


def train_dpo(
    config: DPOConfig,
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    train_preferences: Sequence[Preference],
    eval_preferences: Sequence[Preference],
    *,
    trust_remote_code: bool = False,
    run_flags: Mapping[str, Any] | None = None,
) -> DPOResult:
    """Trains a policy on pairs and evaluates its implicit reward on the held-out ones.

    model: a language model, by name or as an object, which is changed in place. tokenizer: the model's own if None.
    Pairs with a side longer than `max_length` tokens or an empty prompt are dropped and counted in the result's
    RowReports. run_flags: what else the run depends on; a resumed run must have the same. Raises ModelError for a model
    that cannot be opened, DataError if no pair is left, and CheckpointError as `SupervisedTrainer.train` does.
    """
    config.set_seeds()
    if tokenizer is None or isinstance(tokenizer, str):
        name = tokenizer or (model if isinstance(model, str) else model.config.name_or_path)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    require_eos(tokenizer)
    if isinstance(model, str):
        model = load_language_model(model, seq2seq=config.use_seq2seq, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer)
    max_length = longest_input(model, tokenizer, config.max_length)
    train, train_rows = pair_features(train_preferences, tokenizer, config.template, max_length)
    held_out, eval_rows = pair_features(eval_preferences, tokenizer, config.template, max_length)
    for name, features, rows in (("training", train, train_rows), ("held-out", held_out, eval_rows)):
        if rows.dropped:
            logger.info("%s pairs: %s", name, rows)
        if not features:
            raise DataError(f"No {name} pair is left ({rows}): give more data, or a larger --max_length.")

    sample = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(config.seed))
    evaluated = [held_out[row] for row in sample[: config.eval_samples].tolist()]
    reference = DPOTrainer(ResponsePolicy(model), config)
    for features in (train, held_out):
        for pair, ref_logprobs in zip(features, reference.logprobs(features), strict=True):
            pair["ref_logprobs"] = ref_logprobs
    policy = ResponsePolicy(_with_adapters(model, config) if config.use_peft else model)
    trainer = DPOTrainer(
        policy,
        config,
        train_dataset=train,
        eval_dataset=[evaluated[row] for row in _by_length(evaluated)],
    )
    trainer.run_flags |= {"training pairs": fingerprint(train), "held-out pairs": fingerprint(held_out)}
    trainer.run_flags |= run_flags or {}
    trainer.train()

    metrics = trainer.metrics(trainer.logprobs(held_out), held_out)
    trainer.log({f"eval_{name}": value for name, value in metrics.items()})
    return DPOResult(
        model=policy.plain_model(),
        tokenizer=tokenizer,
        metrics=metrics,
        history=trainer.history,
        train_rows=train_rows,
        eval_rows=eval_rows,
    )


def pair_features(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, template: str, max_length: int
) -> tuple[list[Features], RowReport]:
    """Tokenises each pair once, with EOS after each response; pairs that cannot be used are dropped and counted."""
    form = get_template(template)
    features: list[Features] = []
    dropped = {"too long": 0, "empty prompt": 0}
    if preferences:
        texts = [form.response(response) for pair in preferences for response in (pair.a, pair.b)]
        prompts = tokenizer([form.prompt(pair.prompt) for pair in preferences], verbose=False).input_ids
        responses = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for row, (pair, prompt) in enumerate(zip(preferences, prompts, strict=True)):
            a, b = ([*response, tokenizer.eos_token_id] for response in responses[2 * row : 2 * row + 2])
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
    """A batch of B pairs: `prompt_*` [B, P], `response_*` [B, 2, R], `ref_logprobs` [B, 2], the others [B].

    Prompts are padded on the left for a decoder, where the response follows directly, and on the right for an encoder.
    """
    prompt_ids, prompt_mask = _padded([pair["ids"][0] for pair in features], left=prompts_left)
    response_ids, response_mask = _padded([ids for pair in features for ids in pair["ids"][1:]], left=False)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "response_ids": response_ids.unflatten(0, (-1, 2)),
        "response_mask": response_mask.unflatten(0, (-1, 2)),
        "ref_logprobs": torch.stack([pair["ref_logprobs"] for pair in features]),
        "labels": torch.tensor([pair["labels"] for pair in features]),
        "weight": torch.tensor([pair["weight"] for pair in features]),
        "label_noise": stated_noise(features),
    }


def dpo_metrics(
    logprobs: Tensor, ref_logprobs: Tensor, mu: Tensor, *, beta: float, label_noise: Tensor | float = 0.0
) -> dict[str, float]:
    """Figures of the implicit reward, from log-probabilities [N, 2] of responses a and b, as a prediction of mu [N].

    `loss` is the mean over all pairs. `reward_chosen`, `reward_rejected`, their difference `margin`, and `accuracy`,
    the share of margins above 0 (0 counts ½), are means over the pairs that are not ties, and NaN if there are none.
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


def _with_adapters(model: PreTrainedModel, config: DPOConfig) -> Any:
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type=task_type)


def _by_length(features: Sequence[Features]) -> list[int]:
    """The rows from the shortest pair to the longest, so that batches hold little padding."""
    return sorted(range(len(features)), key=lambda row: sum(len(ids) for ids in features[row]["ids"]))


def _padded(sequences: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [n, L] int64 and mask [n, L] bool; the padding is id 0 with mask False."""
    width = max(len(ids) for ids in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, tokens in enumerate(sequences):
        columns = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, columns] = tokens.long()
        mask[row, columns] = True
    return ids, mask

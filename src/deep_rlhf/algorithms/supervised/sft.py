"""Supervised fine-tuning on good responses, the start of every RLHF run (Ouyang et al. 2022, §3.5).

The loss counts the tokens of the response and its EOS. With an empty prompt it is plain language modelling.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from deep_rlhf.algorithms.supervised.batches import Batch
from deep_rlhf.algorithms.supervised.checkpoints import fingerprint
from deep_rlhf.algorithms.supervised.config import SupervisedConfig
from deep_rlhf.algorithms.supervised.loop import SupervisedTrainer
from deep_rlhf.errors import ConfigError, DataError
from deep_rlhf.models.validation import check_vocabulary, require_eos
from deep_rlhf.settings import setting

logger = logging.getLogger(__name__)

IGNORED = -100  # label of tokens that do not count in the loss


@dataclass
class SFTConfig(SupervisedConfig):
    """Every flag of transformers.TrainingArguments, and the longest example in tokens.

    Raises ConfigError for a value out of bounds, and if an evaluation is asked for: SFT has no held-out data.
    """

    max_length: int = setting(512, "Tokens of prompt and response; longer examples are dropped and counted.", least=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_strategy != "no":
            raise ConfigError("--eval_strategy: SFT has no held-out data to evaluate on; leave it out.")


def train_sft(
    config: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    on_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Trains `model` in place on (prompt, response) texts and returns the last log entry, with `train_loss`.

    The loss is the mean over all response tokens of an update, EOS included. Examples longer than `max_length`, and
    those without any text, are dropped, and a warning counts them. `on_step` is called after each update; an exception
    that it raises ends the training. Raises DataError if no example fits, and CheckpointError and NotFiniteError as
    `SupervisedTrainer.train` does.
    """
    require_eos(tokenizer)
    check_vocabulary(model, tokenizer)
    given = [row for row in _tokenized(tokenizer, examples) if row["labels"].ne(IGNORED).any()]
    rows = [row for row in given if len(row["input_ids"]) <= config.max_length]
    if not rows:
        raise DataError(
            f"None of the {len(examples)} examples has a token to learn and at most {config.max_length} tokens: raise"
            " max_length, or give longer responses."
        )
    for dropped, why in (
        (len(given) - len(rows), f"have more than {config.max_length} tokens"),
        (len(examples) - len(given), "are empty"),
    ):
        if dropped:
            logger.warning("%d of %d examples %s: dropped.", dropped, len(examples), why)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    callbacks = [_OnStep(on_step)] if on_step is not None else []
    trainer = _SFTTrainer(model, config, pad_id=pad_id, train_dataset=rows, callbacks=callbacks)
    trainer.run_flags["examples"] = fingerprint(rows)
    return trainer.train()


class _SFTTrainer(SupervisedTrainer):
    def __init__(self, model: nn.Module, config: SFTConfig, *, pad_id: int, **options: Any) -> None:
        super().__init__(model, config, **options)
        self.pad_id = pad_id

    def collate(self, examples: list[dict[str, Tensor]]) -> Batch:
        """`input_ids`, `attention_mask` and `labels`, each [B, T], padded on the right."""
        input_ids = [example["input_ids"] for example in examples]
        labels = [example["labels"] for example in examples]
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    def items(self, batch: Batch) -> Tensor:
        """The response tokens."""
        return batch["labels"].ne(IGNORED).sum()

    def loss(self, batch: Batch) -> Tensor:
        """−Σ log π(token) over the response tokens."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        targets = nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]  # the next token of each
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )


class _OnStep(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.act()


def _tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]]) -> list[dict[str, Tensor]]:
    prompts = tokenizer([prompt for prompt, _ in examples]).input_ids
    responses = tokenizer([response for _, response in examples], add_special_tokens=False).input_ids
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = [*prompt, *response, tokenizer.eos_token_id]
        given = max(len(prompt), 1)  # no token predicts the first one of a text
        labels = [IGNORED] * given + ids[given:]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows

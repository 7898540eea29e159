"""Supervised fine-tuning: the likelihood of good answers, the start of every RLHF run (Ouyang et al. 2022, §3.5).

transformers.Trainer does the training; what is ours is which tokens count: those of the answer and its EOS. An empty
prompt makes it plain language modelling.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from deep_rlhf.errors import UserError

logger = logging.getLogger(__name__)

IGNORED = -100  # the label that transformers' losses leave out


@dataclass
class SFTConfig(TrainingArguments):
    """Every flag of transformers.TrainingArguments, and the longest example in tokens."""

    max_length: int = field(default=512, metadata={"help": "examples with more tokens are dropped and counted"})


def train_sft(
    config: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    on_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Trains `model` in place on (prompt, answer) texts and returns the Trainer's metrics.

    The loss is the mean over all answer tokens of a step, EOS included. Examples that are too long are left out, and
    a warning counts them. `on_step` is called after each update; what it raises ends the training. Raises UserError if
    no example fits.
    """
    rows = [row for row in _tokenized(tokenizer, examples) if len(row["input_ids"]) <= config.max_length]
    if not rows:
        raise UserError(
            f"None of the {len(examples)} examples has at most {config.max_length} tokens: raise max_length."
        )
    if len(rows) < len(examples):
        left_out = len(examples) - len(rows)
        logger.warning(
            "%d of %d examples have more than %d tokens: left out.", left_out, len(examples), config.max_length
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = Trainer(model=model, args=config, train_dataset=rows, data_collator=lambda batch: _collate(batch, pad_id))
    if on_step is not None:
        trainer.add_callback(_AfterEach(on_step))
    return trainer.train().metrics


class _AfterEach(TrainerCallback):
    def __init__(self, what: Callable[[], None]) -> None:
        self.what = what

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.what()


def _tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]]) -> list[dict[str, Tensor]]:
    prompts = tokenizer([prompt for prompt, _ in examples]).input_ids
    answers = tokenizer([answer for _, answer in examples], add_special_tokens=False).input_ids
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        given = max(len(prompt), 1)  # nothing predicts the first token of all
        labels = [IGNORED] * given + ids[given:]
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows


def _collate(batch: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    input_ids = [row["input_ids"] for row in batch]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in batch], batch_first=True, padding_value=IGNORED),
    }

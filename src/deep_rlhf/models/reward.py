"""Reward models: text in, one score per ensemble member out, each with its own tokenizer.

On disk a reward model is a plain transformers folder that `AutoModelForSequenceClassification` opens (K labels: one
head per member on a shared trunk), with `reward_model.json` beside the weights: mean and standard deviation of the
scores, the template of the texts, the maximum length and the metrics of the training run.
"""

import copy
import inspect
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.data.chat import TEMPLATES, get_template
from deep_rlhf.errors import ModelError, RewardError
from deep_rlhf.models.files import read_object
from deep_rlhf.models.function_scorer import TIMEOUT, FunctionScorer, import_function
from deep_rlhf.models.load import (
    disable_dropout,
    has_reward_head,
    load_config,
    load_sequence_classifier,
    load_tokenizer,
)
from deep_rlhf.models.saving import check_saved, save_tokenizer, write_folder
from deep_rlhf.models.validation import check_rewards, check_vocabulary
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.runtime.memory import token_budget_batches
from deep_rlhf.types import Scorer

logger = logging.getLogger(__name__)

CARD = "reward_model.json"
PAD_TOKEN = "<|pad|>"
TOKENS_PER_BATCH = 8192  # in one forward pass that scores texts, padding included


class RewardModel:
    """Scores responses with the K heads of a sequence classifier; a `deep_rlhf.types.Scorer`.

    mean, std: [K], of the raw scores of training responses; `score` returns (raw − mean) / std, so that every member
    has mean 0 and standard deviation 1 there (Christiano et al. 2017, §2.2.1). template: name of the text format of
    prompt and response, None to concatenate them. max_length: in tokens, None for the model's context length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        max_length: int | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)  # the policy may share the object, and its vocabulary must not change
        ensure_pad_token(model, tokenizer)
        use_fast_kernels(model)
        tokenizer.truncation_side = "left"  # the response is at the end
        members = model.config.num_labels
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = longest_input(model, tokenizer, max_length)
        self.mean = torch.zeros(members) if mean is None else mean
        self.std = torch.ones(members) if std is None else std
        self.metrics = metrics or {}

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The normalised scores of each response, [N, K] float32 on the CPU; long texts are truncated at the start."""
        texts = [render(self.template, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return (self.raw_scores(texts) - self.mean) / self.std

    @torch.no_grad()
    def raw_scores(self, texts: Sequence[str]) -> Tensor:
        """The classifier's outputs for whole texts, [N, K] float32 on the CPU."""
        scores = torch.zeros(len(texts), self.model.config.num_labels)
        if not texts:
            return scores
        self.model.eval()
        sequences = tokenize(self.tokenizer, texts, truncate_to=self.max_length)
        for rows in token_budget_batches([len(sequence) for sequence in sequences], TOKENS_PER_BATCH):
            batch = pad([sequences[row] for row in rows], self.tokenizer.pad_token_id)
            logits = self.model(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).logits
            scores[rows] = logits.float().cpu()
        return scores

    def save(self, folder: str | Path) -> None:
        """Writes weights (safetensors), tokenizer and `reward_model.json` into `folder`, when all are complete.

        Raises NotFiniteError if a weight, or the scores' mean or deviation, is not finite, ResourceError if the files
        cannot be written, and ModelError if a saved weight differs; an earlier model there stays as it was.
        """
        check_finite({"mean": self.mean, "std": self.std}.items(), f"The reward model is not saved in '{folder}'")
        check_finite(self.model, f"The reward model is not saved in '{folder}'")
        card = {
            "template": self.template,
            "template_fingerprint": TEMPLATES[self.template].fingerprint() if self.template else None,
            "max_length": self.max_length,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "metrics": self.metrics,
        }

        def write(temporary: Path) -> None:
            self.model.save_pretrained(temporary)
            save_tokenizer(self.tokenizer, temporary)
            check_saved(self.model, temporary)
            (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

        write_folder("reward model", folder, write)

    @classmethod
    def load(cls, name: str | Path, *, trust_remote_code: bool = False) -> "RewardModel":
        """Opens a folder or Hub name: a saved RewardModel, or a classifier with one label (without normalisation).

        Raises ModelError if it cannot be opened, is not a sequence classifier, or has several labels and no
        `reward_model.json`, which would show that they are members of an ensemble.
        """
        name = str(name)
        config = load_config(name, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if not has_reward_head(config):
            raise ModelError(f"'{name}' has no reward head: train one with reward_modeling.py and give that folder.")
        card = _read_card(name)
        if card is None and config.num_labels > 1:
            raise ModelError(
                f"'{name}' is a classifier with {config.num_labels} classes and no {CARD}: choose the output"
                " that is the reward with --reward_model=python:module:function."
            )
        model = load_sequence_classifier(name, num_labels=config.num_labels, trust_remote_code=trust_remote_code)
        settings = {} if card is None else _settings(card, name, config.num_labels)
        reward_model = cls(disable_dropout(model), tokenizer, **settings)
        check_rewards(reward_model.model, reward_model.tokenizer, name)
        return reward_model


def load_scorer(spec: str, *, trust_remote_code: bool = False, timeout: float = TIMEOUT) -> Scorer:
    """Opens the scorer `spec`: a folder or Hub name (raises ModelError) or python:module:function (RewardError).

    `timeout`: seconds that the import and each call of a function may take.
    """
    if spec.startswith("python:"):
        return import_function(spec, timeout=timeout)
    return RewardModel.load(spec, trust_remote_code=trust_remote_code)


def as_scorer(reward: Any, *, trust_remote_code: bool = False, timeout: float = TIMEOUT) -> Scorer:
    """A Scorer from a Scorer, which is returned as it is, a function, or what `load_scorer` opens.

    Raises RewardError for anything else.
    """
    if isinstance(reward, str):
        return load_scorer(reward, trust_remote_code=trust_remote_code, timeout=timeout)
    if not inspect.isclass(reward) and callable(getattr(reward, "score", None)):
        return reward
    return FunctionScorer(reward, str(getattr(reward, "__name__", "reward")), timeout=timeout)


def member_scores(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """What `scorer.score` returns, [N, K] float32. Raises RewardError if a user's Scorer returns anything else."""
    scores = scorer.score(prompts, responses)
    is_valid = isinstance(scores, Tensor) and scores.dim() == 2 and len(scores) == len(responses) and scores.shape[1]
    if not is_valid or scores.is_complex() or scores.is_meta:
        shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(
            f"{type(scorer).__name__}.score must return a tensor [{len(responses)}, K] with one score per response and"
            f" ensemble member, and it returned {shape}: correct it."
        )
    return scores.detach().float().cpu()


def render(template: str | None, prompt: str, response: str) -> str:
    """The text of a prompt and a response in the template; text already in the template's format is unchanged."""
    if template is None:
        return prompt + response
    form = get_template(template)
    return form.prompt(prompt) + form.response(response)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, truncate_to: int | None = None
) -> list[Tensor]:
    """Token ids of each text with the tokenizer's special tokens, int32, truncated to `truncate_to` if given.

    Token types are omitted: a single text has type 0 everywhere, which encoders assume by default, and GPT-2 would add
    the embedding of token 0 to every position.
    """
    encoded = tokenizer(
        list(texts),
        truncation=truncate_to is not None,
        max_length=truncate_to,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [torch.tensor(ids, dtype=torch.int32) for ids in encoded["input_ids"]]


def pad(sequences: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [N, L] int64, padded on the right to the longest sequence."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    input_ids = pad_sequence(list(sequences), batch_first=True, padding_value=pad_token_id).long()
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}


def ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives both a padding token other than EOS: a decoder's score is that of the last token that is not padding.

    Raises ModelError if the tokenizer has other ids that the model does not have.
    """
    check_vocabulary(model, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """The context length of model and tokenizer in tokens, at most `max_length`."""
    limits = (max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min(limit for limit in limits if limit)


def reward_head(model: Any) -> nn.Linear:
    """The layer that outputs the K rewards: the last linear layer with K outputs."""
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    return heads[-1]


def init_reward_head(model: PreTrainedModel) -> None:
    """Initialises the heads: normal with standard deviation 1/√(d + 1), bias 0 (Huang et al. 2024)."""
    head = reward_head(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    model.config.architectures = [type(model).__name__]  # so that has_reward_head holds


def _read_card(name: str) -> dict[str, Any] | None:
    if os.path.lexists(Path(name) / CARD):
        return read_object(Path(name) / CARD)
    try:
        path = None if Path(name).is_dir() else cached_file(name, CARD)
    except OSError:
        return None
    return read_object(Path(path)) if path else None


def _settings(card: dict[str, Any], name: str, members: int) -> dict[str, Any]:
    """The arguments of RewardModel from its card."""
    for key in ("mean", "std"):
        value = card.get(key)
        if not (isinstance(value, list) and len(value) == members and all(_is_finite(number) for number in value)):
            raise _bad_card(name, f"`{key}` must be a list of {members} finite numbers, one per member", value)
    if min(card["std"]) <= 0:
        raise _bad_card(name, "`std` must be positive", card["std"])
    template, max_length, metrics = (card.get(key) for key in ("template", "max_length", "metrics"))
    if template is not None and not isinstance(template, str):
        raise _bad_card(name, "`template` must be the name of one, or null", template)
    if "template" not in card:
        raise _bad_card(name, "`template` is missing", None)
    is_length = isinstance(max_length, int) and not isinstance(max_length, bool) and max_length >= 1
    if max_length is not None and not is_length:
        raise _bad_card(name, "`max_length` must be a whole number of at least 1, or null", max_length)
    if metrics is not None and not isinstance(metrics, dict):
        raise _bad_card(name, "`metrics` must be an object", metrics)
    if template is not None and template not in TEMPLATES:
        logger.warning(
            "'%s' was trained with the unknown template '%s': prompt and response are concatenated.", name, template
        )
        template = None
    elif template is not None and TEMPLATES[template].fingerprint() != card.get("template_fingerprint"):
        logger.warning("'%s' was trained with another version of the template '%s': train it again.", name, template)
    mean, std = (torch.tensor(card[key], dtype=torch.float32) for key in ("mean", "std"))
    return {"template": template, "max_length": max_length, "metrics": metrics, "mean": mean, "std": std}


def _is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def _bad_card(name: str, what: str, value: Any) -> ModelError:
    return ModelError(f"{CARD} of '{name}': {what}, not {value!r}: train the reward model again.")

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.data.chat import TEMPLATES, get_template
from deep_rlhf.errors import ModelError, RewardError
from deep_rlhf.models.function_scorer import TIMEOUT, FunctionScorer, import_function
from deep_rlhf.models.load import disable_dropout, load_sequence_classifier, load_tokenizer, no_configuration
from deep_rlhf.models.saving import save_model
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
        """Writes weights (safetensors), tokenizer and `reward_model.json` into `folder`.

        Raises NotFiniteError, and writes nothing, if a weight, or the scores' mean or deviation, is not finite.
        """
        check_finite({"mean": self.mean, "std": self.std}.items(), f"The reward model is not saved in '{folder}'")
        save_model(self.model, self.tokenizer, folder)
        card = {
            "template": self.template,
            "template_fingerprint": TEMPLATES[self.template].fingerprint() if self.template else None,
            "max_length": self.max_length,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "metrics": self.metrics,
        }
        (Path(folder) / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, name: str | Path, *, trust_remote_code: bool = False) -> "RewardModel":
        """Opens a folder or Hub name: a saved RewardModel, or a classifier with one label (without normalisation).

        Raises ModelError if it cannot be opened, is not a sequence classifier, or has several labels and no
        `reward_model.json`, which would show that they are members of an ensemble.
        """
        name = str(name)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        config = _config(name, trust_remote_code)
        if not has_reward_head(config):
            raise ModelError(f"'{name}' has no reward head: train one with reward_modeling.py and give that folder.")
        card = _read_card(name)
        if card is None and config.num_labels > 1:
            raise ModelError(
                f"'{name}' is a classifier with {config.num_labels} classes and no {CARD}: choose the output"
                " that is the reward with --reward_model=python:module:function."
            )
        model = load_sequence_classifier(name, num_labels=config.num_labels, trust_remote_code=trust_remote_code)
        settings = _settings(card, name, config.num_labels) if card else {}
        return cls(disable_dropout(model), tokenizer, **settings)


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
    """Gives both a padding token other than EOS: a decoder's score is that of the last token that is not padding."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """The context length of model and tokenizer in tokens, at most `max_length`."""
    limits = (max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min(limit for limit in limits if limit)


def has_reward_head(config: PretrainedConfig) -> bool:
    """Whether a checkpoint contains a reward head; else opening a language model makes a random one."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


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


def _config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{name}' {no_configuration(error)}: give a folder from reward_modeling.py.") from error


def _read_card(name: str) -> dict[str, Any] | None:
    try:
        path = cached_file(name, CARD)
    except OSError:
        return None
    try:
        card = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{CARD} of '{name}' is not valid JSON ({error}): train the reward model again.") from None
    return card if isinstance(card, dict) else {}


def _settings(card: dict[str, Any], name: str, members: int) -> dict[str, Any]:
    """The arguments of RewardModel from its card."""
    mean, std = (torch.tensor(card.get(key, []), dtype=torch.float32) for key in ("mean", "std"))
    if len(mean) != members or len(std) != members:
        raise ModelError(f"{CARD} of '{name}' must contain `mean` and `std` of all {members} members: train it again.")
    template = card.get("template")
    if template is not None and template not in TEMPLATES:
        logger.warning(
            "'%s' was trained with the unknown template '%s': prompt and response are concatenated.", name, template
        )
        template = None
    elif template is not None and TEMPLATES[template].fingerprint() != card.get("template_fingerprint"):
        logger.warning("'%s' was trained with another version of the template '%s': train it again.", name, template)
    settings = {key: card.get(key) for key in ("max_length", "metrics")}
    return settings | {"template": template, "mean": mean, "std": std}

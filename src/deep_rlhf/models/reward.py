"""Reward models: text in, one score per ensemble member out, each with its own tokenizer.

On disk a reward model is a plain transformers folder that `AutoModelForSequenceClassification` opens (K labels: one
head per member over a shared trunk), with `reward_model.json` beside the weights: what the scores must be shifted and
scaled by, how dialogues were rendered as text, the longest input, and the metrics it was saved with.
"""

import copy
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
from deep_rlhf.data.batching import token_budget_batches
from deep_rlhf.data.chat import TEMPLATES, get_template
from deep_rlhf.errors import UserError
from deep_rlhf.models.function_scorer import import_function
from deep_rlhf.models.load import disable_dropout, load_sequence_classifier, load_tokenizer, no_configuration
from deep_rlhf.types import Scorer

logger = logging.getLogger(__name__)

CARD = "reward_model.json"
PAD_TOKEN = "<|pad|>"
TOKENS_PER_BATCH = 8192  # of one scoring forward, padding included


class RewardModel:
    """Scores answers with the K heads of a sequence classifier; a `deep_rlhf.types.Scorer`.

    mean, std: [K] of the raw scores on training answers; `score` returns (raw − mean) / std, so that every member has
    mean 0 and standard deviation 1 there (Christiano et al. 2017, §2.2.1). template: the name of the format that
    prompts and answers are brought into, None to join them as they are. max_length: in tokens, None for all that the
    model reads.
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
        tokenizer = copy.deepcopy(tokenizer)  # the policy may use the same object, and its vocabulary stays as it is
        ensure_pad_token(model, tokenizer)
        use_fast_kernels(model)
        tokenizer.truncation_side = "left"  # the answer is at the end
        members = model.config.num_labels
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = longest_input(model, tokenizer, max_length)
        self.mean = torch.zeros(members) if mean is None else mean
        self.std = torch.ones(members) if std is None else std
        self.metrics = metrics or {}

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The normalised scores of each response, [N, K] float32 on the CPU; texts too long lose their start."""
        texts = [render(self.template, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return (self.raw_scores(texts) - self.mean) / self.std

    @torch.no_grad()
    def raw_scores(self, texts: Sequence[str]) -> Tensor:
        """The classifier's own outputs for whole texts, [N, K] float32 on the CPU."""
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
        """Writes weights (safetensors), tokenizer and `reward_model.json` into `folder`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
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
        """Opens a folder or Hub name: a saved RewardModel, or any classifier with one label (normalisation: identity).

        Raises UserError if it cannot be opened, is no sequence classifier, or has several labels and no
        `reward_model.json` to say that they are members of an ensemble.
        """
        name = str(name)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        config = _config(name, trust_remote_code)
        if not has_reward_head(config):
            raise UserError(f"'{name}' has no reward head: train one with reward_modeling.py and give that folder.")
        card = _read_card(name)
        if card is None and config.num_labels > 1:
            raise UserError(
                f"'{name}' is a classifier with {config.num_labels} classes and no {CARD}: say which of its outputs is"
                " the reward with --reward_model=python:module:function."
            )
        model = load_sequence_classifier(name, num_labels=config.num_labels, trust_remote_code=trust_remote_code)
        settings = _settings(card, name, config.num_labels) if card else {}
        return cls(disable_dropout(model), tokenizer, **settings)


def load_scorer(spec: str, *, trust_remote_code: bool = False) -> Scorer:
    """The scorer that `spec` names: a folder, a Hub name, or `python:module:function`. Raises UserError."""
    if spec.startswith("python:"):
        return import_function(spec)
    return RewardModel.load(spec, trust_remote_code=trust_remote_code)


def render(template: str | None, prompt: str, answer: str) -> str:
    """What a reward model reads of a prompt and an answer; text already in the template's form stays as it is."""
    if template is None:
        return prompt + answer
    form = get_template(template)
    return form.prompt(prompt) + form.answer(answer)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, truncate_to: int | None = None
) -> list[Tensor]:
    """Token ids of each text with the tokenizer's own special tokens, int32, cut to `truncate_to` or whole.

    Token types are left out: a single text has type 0 everywhere, which is what encoders assume when they get none, and
    GPT-2 would add the embedding of token 0 to every position.
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
    """Gives both a padding token distinct from EOS: a decoder reads its score at the last token that is no padding."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """Tokens that model and tokenizer can read, at most `max_length`."""
    limits = (max_length, getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min(limit for limit in limits if limit)


def has_reward_head(config: PretrainedConfig) -> bool:
    """Whether a checkpoint's head was trained, rather than made at random when a language model was opened."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def reward_head(model: Any) -> nn.Linear:
    """The layer that gives the K rewards: the last of that many outputs."""
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    return heads[-1]


def init_reward_head(model: PreTrainedModel) -> None:
    """Draws the heads afresh: normal with standard deviation 1/√(d + 1), bias 0 (Huang et al. 2024)."""
    head = reward_head(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    model.config.architectures = [type(model).__name__]  # from here on it has a reward head


def _config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"'{name}' {no_configuration(error)}: give a folder from reward_modeling.py.") from error


def _read_card(name: str) -> dict[str, Any] | None:
    try:
        path = cached_file(name, CARD)
    except OSError:
        return None
    try:
        card = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{CARD} of '{name}' is not valid JSON ({error}): train the reward model again.") from None
    return card if isinstance(card, dict) else {}


def _settings(card: dict[str, Any], name: str, members: int) -> dict[str, Any]:
    """The arguments of RewardModel that a card holds."""
    mean, std = (torch.tensor(card.get(key, []), dtype=torch.float32) for key in ("mean", "std"))
    if len(mean) != members or len(std) != members:
        raise UserError(f"{CARD} of '{name}' must hold `mean` and `std` of all {members} members: train it again.")
    template = card.get("template")
    if template is not None and template not in TEMPLATES:
        logger.warning("'%s' was trained with the unknown template '%s': texts are joined as they are.", name, template)
        template = None
    elif template is not None and TEMPLATES[template].fingerprint() != card.get("template_fingerprint"):
        logger.warning("'%s' was trained with another version of the template '%s': train it again.", name, template)
    settings = {key: card.get(key) for key in ("max_length", "metrics")}
    return settings | {"template": template, "mean": mean, "std": std}

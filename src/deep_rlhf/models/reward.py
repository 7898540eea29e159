"""Reward models: text in, one score per ensemble member out, each with its own tokenizer.

On disk a reward model is a plain transformers folder that `AutoModelForSequenceClassification` opens (K labels: one
head per member over a shared trunk), with `reward_model.json` beside the weights: what the scores must be shifted and
scaled by, how dialogues were rendered as text, the longest input, and the metrics it was saved with.
"""

import copy
import importlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from deep_rlhf.data.batching import token_budget_batches
from deep_rlhf.data.templates import TEMPLATES, get_template
from deep_rlhf.models.kernels import use_fast_kernels
from deep_rlhf.models.load import disable_dropout, load_sequence_classifier, load_tokenizer
from deep_rlhf.types import Scorer, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


class FunctionScorer:
    """A user's `function(prompts, responses)` that returns one number each; a Scorer with one member.

    It is called in a thread of its own, where it sees the caller's gradient mode and CUDA device, and may take
    `timeout` seconds. NaN and infinity are rewards like any other here: what trains on them has to look.
    """

    def __init__(
        self, function: Callable[[list[str], list[str]], Iterable[Any]], name: str, *, timeout: float = 600.0
    ) -> None:
        self.function = function
        self.name = name
        self.timeout = timeout

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The function's rewards, [N, 1] float32.

        Raises UserError, naming the sample, if the function raises, takes too long, or returns anything but one number
        per response. The sample is found by calling it again on halves, each for at most `timeout` seconds.
        """
        prompts, responses = list(prompts), list(responses)
        try:
            rewards = self._call(prompts, responses)
        except _Failure as failure:
            raise UserError(self._diagnosis(failure, prompts, responses)) from failure.__cause__
        return torch.tensor(rewards, dtype=torch.float32).reshape(-1, 1)

    def _call(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The function's rewards. Raises _Failure; KeyboardInterrupt, SystemExit and their like pass through."""
        try:
            values = _in_time(self.timeout, lambda: _listed(self.function(list(prompts), list(responses))))
        except _TimeUp:
            raise _Failure(f"did not return within {self.timeout:g} s") from None
        except Exception as error:  # whatever a user's function raises
            raise _Failure(" ".join(f"raised {type(error).__name__}: {error}".split())) from error
        if not isinstance(values, list):
            raise _Failure(f"must return one number per response, but it returned a {type(values).__name__}")
        if len(values) != len(responses):
            raise _Failure(f"returned {len(values)} rewards")
        rewards = []
        for row, value in enumerate(values):
            reward = _number(value)
            if reward is None:
                raise _Failure(f"returned {_cut(' '.join(repr(value).split()))} instead of a number", row)
            rewards.append(reward)
        return rewards

    def _diagnosis(self, failure: "_Failure", prompts: list[str], responses: list[str]) -> str:
        """One sentence: what happened, and with which sample."""
        rows, last = self._narrowed(failure, prompts, responses)
        first, text = rows[0], f"{self.name} {failure.reason}"
        sample = f"prompt {_short(prompts[first])}, response {_short(responses[first])}."
        if last is failure and len(rows) == 1:
            return f"{text} for sample {first}: {sample}"
        text = f"{text} for {len(responses)} responses"
        if last is failure:
            return f"{text}, but for neither half of them: only for the whole batch of {len(responses)} samples."
        same = "does the same" if last.reason == failure.reason else last.reason
        if len(rows) == 1:
            return f"{text}; sample {first} alone {same}: {sample}"
        return f"{text}; the batch of samples {first} to {rows[-1]} {same}, but neither half of it: {sample}"

    def _narrowed(self, failure: "_Failure", prompts: list[str], responses: list[str]) -> tuple[range, "_Failure"]:
        """The smallest part of the batch that repeated halving finds to fail, and how it failed."""
        rows = range(len(responses))
        if failure.row is None and len(rows) > 1:
            logger.warning("%s %s: looking for the sample by calling it on parts.", self.name, failure.reason)
        while failure.row is None and len(rows) > 1:
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                try:
                    self._call(prompts[half.start : half.stop], responses[half.start : half.stop])
                except _Failure as again:
                    rows, failure = half, again
                    break
            else:
                break
        return (rows if failure.row is None else rows[failure.row : failure.row + 1]), failure


def load_scorer(spec: str, *, trust_remote_code: bool = False) -> Scorer:
    """The scorer that `spec` names: a folder, a Hub name, or `python:module:function`. Raises UserError."""
    if not spec.startswith("python:"):
        return RewardModel.load(spec, trust_remote_code=trust_remote_code)
    module_name, _, function_name = spec.removeprefix("python:").partition(":")
    if not module_name or not function_name:
        raise UserError(f"The reward '{spec}' should read python:module:function, like python:my_rewards:politeness.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"Cannot import the module '{module_name}' of the reward '{spec}': {reason}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"The module '{module_name}' of the reward '{spec}' has no function '{function_name}'.")
    return FunctionScorer(function, f"{module_name}.{function_name}")


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
        raise UserError(f"'{name}' has no readable config.json: give a folder from reward_modeling.py.") from error


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


class _Failure(Exception):
    """What one call of a user's function did wrong, and in which row if its answer tells."""

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.row = row


class _TimeUp(Exception):
    """A call took too long; no TimeoutError, since a user's function may raise that itself."""


def _in_time(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises in a daemon thread: one that hangs keeps neither the caller nor the exit waiting.

    Raises _TimeUp after `seconds`. Ctrl-C ends the wait.
    """
    returned: list[T] = []
    raised: list[BaseException] = []
    # both belong to a thread, and a new one starts with its own
    gradients = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients), torch.cuda.device(device):
                returned.append(call())
        except BaseException as error:  # KeyboardInterrupt and SystemExit too are the caller's to handle
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise _TimeUp
    return returned[0]


def _listed(returned: Any) -> Any:
    """An iterable's items as a list; what is none, or a tensor without dimensions, stays as it is."""
    try:
        items = iter(returned)
    except TypeError:
        return returned
    return list(items)


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor with several elements
        return None


def _short(text: str) -> str:
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"

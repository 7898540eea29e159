"""Opens tokenizers and models by name or folder, with one clear sentence when it cannot be done."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deep_rlhf.errors import UserError
from deep_rlhf.models.quantisation import four_bit_config, keep_trainable

T = TypeVar("T")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a Hub name or folder. Raises UserError if there is none."""
    return _opened("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code))


def load_language_model(
    name: str, *, seq2seq: bool = False, in_4bit: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model that writes text, float32 on the CPU, dropout off. Raises UserError if it cannot be opened.

    `in_4bit` quantises its layers, on the GPU where there is one; embeddings, norms and the head stay float32.
    """
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    what = "encoder-decoder" if seq2seq else "decoder-only language model"
    options = _options(trust_remote_code) | {"output_loading_info": True}
    if in_4bit:
        options["quantization_config"] = four_bit_config()
    model, loaded = _opened(what, name, lambda: auto.from_pretrained(name, **options))
    if loaded["missing_keys"]:
        raise UserError(
            f"'{name}' is no {what}: it lacks the weights {min(loaded['missing_keys'])}. Give a model that writes text,"
            " such as gpt2 (or t5-small with use_seq2seq)."
        )
    keep_trainable(model)
    return disable_dropout(model)


def load_sequence_classifier(name: str, *, num_labels: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with `num_labels` scalar heads, float32 on the CPU. Raises UserError if it cannot be opened."""
    options = _options(trust_remote_code) | {"num_labels": num_labels, "problem_type": "regression"}
    auto = AutoModelForSequenceClassification
    return _opened("reward model", name, lambda: auto.from_pretrained(name, **options))


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Sets every dropout probability to 0, so that train and eval mode compute the same (Huang et al. 2024)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # what is given to functional dropout, and layerdrop
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _first_sentence(error: Exception) -> str:
    """What an error says in its first line, or up to the end of the list that the line begins; with a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = 1
    while lines[0].endswith(":") and end < len(lines) and not lines[end - 1].endswith("."):
        end += 1
    return " ".join(lines[:end]).rstrip(".:") + "."


def no_configuration(error: Exception) -> str:
    """Why a model has no configuration, to stand behind its name."""
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return "cannot be opened (it is no folder and not in the cache, and the Hugging Face Hub was not reached)"
    return "has no readable config.json"


def _options(trust_remote_code: bool) -> dict[str, object]:
    return {"trust_remote_code": trust_remote_code, "dtype": torch.float32, "use_safetensors": True}


def _opened(what: str, name: str, load: Callable[[], T]) -> T:
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise UserError(f"There is no folder '{name}' to open a {what} from: give one that save_pretrained wrote.")
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = _first_sentence(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = f"its architecture is no {what}."
        raise UserError(
            f"Cannot open the {what} '{name}': {reason} Give a folder that save_pretrained wrote, or a name on the Hub."
        ) from error

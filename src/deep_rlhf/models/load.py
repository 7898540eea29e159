"""Opens tokenizers and models by Hub name or folder."""

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

from deep_rlhf.errors import ModelError
from deep_rlhf.models.quantisation import four_bit_config, keep_trainable
from deep_rlhf.runtime.finite import check_finite

T = TypeVar("T")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a Hub name or folder. Raises ModelError if it cannot be opened."""
    return _opened("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code))


def load_language_model(
    name: str, *, seq2seq: bool = False, in_4bit: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A language model in float32 on the CPU, without dropout.

    Raises ModelError if it cannot be opened, and NotFiniteError if a weight is NaN or infinite. `in_4bit` quantises
    its linear layers, on the GPU if there is one; embeddings, norms and head stay float32. Without bitsandbytes it
    raises ResourceError.
    """
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    what = "encoder-decoder" if seq2seq else "decoder-only language model"
    options = _options(trust_remote_code) | {"output_loading_info": True}
    if in_4bit:
        options["quantization_config"] = four_bit_config()
    model, loaded = _opened(what, name, lambda: auto.from_pretrained(name, **options))
    if loaded["missing_keys"]:
        raise ModelError(
            f"'{name}' lacks weights of the {what}, such as {min(loaded['missing_keys'])}. Give a language model like"
            " gpt2 (or t5-small with use_seq2seq)."
        )
    keep_trainable(model)
    check_finite(model, f"'{name}' cannot be used")
    return disable_dropout(model)


def load_sequence_classifier(name: str, *, num_labels: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A classifier with `num_labels` scalar heads, float32 on the CPU.

    Raises ModelError if it cannot be opened, and NotFiniteError if a weight is NaN or infinite.
    """
    options = _options(trust_remote_code) | {"num_labels": num_labels, "problem_type": "regression"}
    auto = AutoModelForSequenceClassification
    model = _opened("reward model", name, lambda: auto.from_pretrained(name, **options))
    check_finite(model, f"'{name}' cannot be used")
    return model


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Sets every dropout probability to 0, so that train and eval mode are identical (Huang et al. 2024)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # probabilities passed to functional dropout, and layerdrop
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _first_sentence(error: Exception) -> str:
    """The first line of an error's message, with the list that it introduces if it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = 1
    while lines[0].endswith(":") and end < len(lines) and not lines[end - 1].endswith("."):
        end += 1
    return " ".join(lines[:end]).rstrip(".:") + "."


def no_configuration(error: Exception) -> str:
    """Why a model's configuration cannot be read, as a phrase to follow its name."""
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return "cannot be opened (no such folder, not in the cache, and the Hugging Face Hub cannot be reached)"
    return "has no readable config.json"


def _options(trust_remote_code: bool) -> dict[str, object]:
    return {"trust_remote_code": trust_remote_code, "dtype": torch.float32, "use_safetensors": True}


def _opened(what: str, name: str, load: Callable[[], T]) -> T:
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise ModelError(
            f"There is no folder '{name}' to open the {what} from: give a folder written by save_pretrained."
        )
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = _first_sentence(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = "its architecture is of another kind."
        raise ModelError(
            f"Cannot open the {what} '{name}': {reason} Give a folder written by save_pretrained, or a Hub name."
        ) from error

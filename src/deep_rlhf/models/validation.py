"""Checks of configurations, tokenizers and opened models: what would be wrong without an error is refused."""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.errors import ModelError, NotFiniteError, ResourceError, UserError
from deep_rlhf.models.files import CONFIG, Stored, file_of_tensor, names_of
from deep_rlhf.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)

TRIAL = "A trial: 12 words, \u00e9 and \u96ea.\n"  # a tokenizer that fails on a text fails on this one
MOST_LAYERS = 10_000
LARGEST = 2**31
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
)


@contextmanager
def opening(what: str, name: str) -> Iterator[None]:
    """Turns every exception of the libraries that the block calls into a ModelError about `what`, a name or folder.

    A model larger than the memory is a ResourceError. The block must call nothing but libraries, so that no error of
    this package is hidden.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(f"The {what} '{name}' does not fit in memory: use a smaller model.") from error
        raise ModelError(
            f"Cannot open the {what} '{name}': {_reason(error, name)} Give a folder written by save_pretrained, or a"
            " Hub name."
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, with the list that it introduces if it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = 1
    while lines[0].endswith(":") and end < len(lines) and not lines[end - 1].endswith("."):
        end += 1
    return " ".join(lines[:end]).rstrip(".:") + "."


def check_config(config: Any, name: str) -> None:
    """Raises ModelError for sizes and token ids that no model can have. `config` is a transformers configuration."""
    text = config.get_text_config()
    for field in _SIZES:
        value = getattr(text, field, None)
        shown = getattr(text, "attribute_map", {}).get(field, field)
        most = MOST_LAYERS if field == "num_hidden_layers" else LARGEST
        if isinstance(value, bool | str | float) or (isinstance(value, int) and not 1 <= value <= most):
            raise ModelError(
                f"The {CONFIG} of '{name}' sets {shown} to {value!r}: it must be a whole number from 1 to {most}."
            )
    heads, groups = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ModelError(
            f"The {CONFIG} of '{name}' sets num_attention_heads to {heads}, no multiple of its num_key_value_heads,"
            f" {groups}."
        )
    vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int):
        check_token_ids(text, vocabulary, f"The {CONFIG} of '{name}'", ("pad_token_id", "decoder_start_token_id"))


def check_token_ids(holder: Any, vocabulary: int, where: str, fields: tuple[str, ...]) -> None:
    """Raises ModelError unless each field is None, an id below `vocabulary` or (eos_token_id) a list of them."""
    for field in fields:
        value = getattr(holder, field, None)
        ids = value if field == "eos_token_id" and isinstance(value, list | tuple) else [value]
        for token in ids:
            if token is None or (field == "pad_token_id" and token == -1 and not isinstance(token, bool)):
                continue  # LLaMA's first configurations have -1 for none
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise ModelError(
                    f"{where} sets {field} to {value!r}: it must be the id of a token, a whole number from 0 to"
                    f" {vocabulary - 1}."
                )


def check_size(skeleton: PreTrainedModel, stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises ModelError if a model has more than twice the weights that its files hold, before memory is taken.

    And if a file holds whole numbers as weights.
    """
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if needed > 2 * held:
        raise ModelError(
            f"'{folder / CONFIG}' describes a model of {needed} weights, but the files beside it hold {held}: they are"
            " of different models."
        )
    for name, _, needs in _pairs(skeleton, stored):
        if needs.is_floating_point() and "F" not in stored[name].dtype:
            raise ModelError(
                f"'{file_of_tensor(folder, name)}' holds '{name}' as {stored[name].dtype}, not as floating-point"
                " numbers: copy it again."
            )


def check_shapes(skeleton: PreTrainedModel, stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises ModelError for the first tensor whose shape in the files is not the one that the model needs."""
    for name, shape, needs in _pairs(skeleton, stored):
        if shape != needs.shape:
            raise ModelError(
                f"'{file_of_tensor(folder, name)}' holds '{name}' with shape {list(shape)}, but the {CONFIG} (and the"
                f" number of rewards) asks for {list(needs.shape)}: they are of different models."
            )


def check_keys(model: PreTrainedModel, loaded: Mapping[str, Any], name: str, *, may_lack: bool) -> None:
    """Raises ModelError for layers that only the files or only the configuration have.

    `may_lack`: whether weights above the trunk, such as a new head, may be missing. Other weights that the model does
    not use are named in a warning.
    """
    known = {_layer_pattern(key) for key in model.state_dict()}
    layers = {
        key for key in loaded["unexpected_keys"] if re.search(r"\.\d+\.", f".{key}") and _layer_pattern(key) in known
    }
    if layers:
        raise ModelError(
            f"The weights of '{name}' have layers that its {CONFIG} does not have, such as {names_of(layers)}: they are"
            " of different models."
        )
    missing = set(loaded["missing_keys"])
    if may_lack:
        inside = f"{model.base_model_prefix}."
        missing = {key for key in missing if key.startswith(inside) and "pooler" not in key}
    if missing:
        raise ModelError(
            f"'{name}' lacks weights of the {type(model).__name__}, such as {names_of(missing)}: its files are of"
            " another kind of model, or incomplete."
        )
    if loaded["unexpected_keys"] and not may_lack:
        logger.warning("'%s' has weights that the model does not use: %s.", name, names_of(loaded["unexpected_keys"]))


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Raises NotFiniteError for the first weight that is NaN or infinite."""
    for key, weight in model.state_dict().items():
        if not weight.is_floating_point() or weight.is_meta or bool(weight.sum(dtype=torch.float32).isfinite()):
            continue
        if not bool(weight.isfinite().all()):
            where = file_of_tensor(Path(name), key) if Path(name).is_dir() else name
            bad = float(weight[~weight.isfinite()][0])
            raise NotFiniteError(f"'{where}' cannot be used: the weight {key} contains {bad}.")


def check_generation(model: PreTrainedModel, name: str) -> None:
    """Raises ModelError for ids of the end of a text that are not tokens of the model."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    fields = ("eos_token_id", "decoder_start_token_id")
    check_token_ids(model.config.get_text_config(), vocabulary, f"The {CONFIG} of '{name}'", fields)
    if model.generation_config is not None:
        where = f"The generation_config.json of '{name}'"
        check_token_ids(model.generation_config, vocabulary, where, (*fields, "pad_token_id"))
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        raise ModelError(f"The {CONFIG} of '{name}' has no decoder_start_token_id, which its decoder begins with.")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError for a tokenizer without tokens, without a usable length, or that fails on a short text."""
    with opening("tokenizer", name):
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        ids = tokenizer(TRIAL, verbose=False).input_ids if known else []
    if not known:
        raise ModelError(f"The tokenizer '{name}' has no tokens: its vocabulary is missing, give a folder with one.")
    if not ids:
        raise ModelError(f"The tokenizer '{name}' turns every text into nothing: its files are damaged.")
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise ModelError(f"The tokenizer_config.json of '{name}' sets model_max_length to {limit!r}: give at least 1.")


@torch.no_grad()
def check_rewards(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError if a classifier fails on a short text, NotFiniteError for a reward that is not finite."""
    was_training = model.training
    model.eval()
    with opening("reward model", name):
        ids = tokenizer(TRIAL, truncation=True, max_length=16, return_tensors="pt", verbose=False).input_ids
        ids = ids.to(model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(was_training)
    if not bool(logits.isfinite().all()):
        raise NotFiniteError(f"The reward model '{name}' computes rewards that are not finite: its files are damaged.")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if the tokenizer has ids that the model does not have; one padding token may be more."""
    size = model.get_input_embeddings().weight.shape[0]
    beyond = [token for token, number in tokenizer.get_vocab().items() if not 0 <= number < size]
    if beyond and beyond != [tokenizer.pad_token]:
        raise ModelError(
            f"The tokenizer '{tokenizer.name_or_path}' has {len(tokenizer)} tokens, but the model"
            f" '{model.name_or_path or model.config.model_type}' has {size}: give the tokenizer that the model was"
            " trained with."
        )


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if a tokenizer has no token for the end of a response."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer '{tokenizer.name_or_path}' has no eos_token, which every response must end with: set it in"
            " its tokenizer_config.json."
        )


def _pairs(skeleton: PreTrainedModel, stored: Mapping[str, Stored]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """The name and shape of each tensor in the files that the model has, too, and the model's own."""
    needed, prefix = skeleton.state_dict(), f"{skeleton.base_model_prefix}."
    for name, tensor in sorted(stored.items()):
        for known in (name, prefix + name, name.removeprefix(prefix)):
            if known in needed:
                yield name, tensor.shape, needed[known]
                break


def _layer_pattern(key: str) -> str:
    """A weight's name from its last numbered layer on, without the number."""
    return re.sub(r"\.\d+\.", ".*.", f".{key}").partition("*")[2]


def _reason(error: Exception, name: str) -> str:
    if isinstance(error, KeyError):
        return _unknown_value(error, name)
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return "no such folder, not in the cache, and the Hugging Face Hub cannot be reached."
    reason = first_sentence(error)
    if isinstance(error, ImportError):
        method = (_config(name).get("quantization_config") or {}).get("quant_method")
        return f"its weights are quantised with {method}, and {reason}" if method else f"a package is missing: {reason}"
    if reason.startswith("Unrecognized configuration class"):
        return "its architecture is of another kind."
    kind = type(error).__name__
    if type(error) is Exception:  # of the tokenizers library
        return f"tokenizer.json: {reason}" if (Path(name) / "tokenizer.json").exists() else reason
    is_plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError) or kind.startswith("Strict")
    return reason if is_plain or reason == f"{kind}." else f"{kind}: {reason}"


def _unknown_value(error: KeyError, name: str) -> str:
    """Names the field of config.json whose value is the key that a library does not know."""
    key = error.args[0] if error.args else ""
    fields = [field for field, value in _config(name).items() if value == key]
    if fields:
        return f"{CONFIG} sets {fields[0]} to {key!r}, which transformers does not know."
    return f"{key!r} is unknown to the library."


def _config(name: str) -> dict[str, Any]:
    """What config.json of a folder says; empty if it cannot be read."""
    try:
        config = json.loads((Path(name) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}

"""Opens tokenizers and models by Hub name or folder."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deep_rlhf.errors import ModelError
from deep_rlhf.models.adapters import merged
from deep_rlhf.models.files import (
    ADAPTER,
    CONFIG,
    check_model_files,
    check_safetensors,
    check_tokenizer_files,
    model_folder,
    read_object,
)
from deep_rlhf.models.quantisation import four_bit_config, keep_trainable
from deep_rlhf.models.validation import (
    check_config,
    check_finite,
    check_generation,
    check_keys,
    check_shapes,
    check_size,
    check_tokenizer,
    opening,
)

logger = logging.getLogger(__name__)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a Hub name or folder. Raises ModelError if it cannot be opened or is damaged."""
    folder = model_folder(name)
    if folder is not None:
        check_tokenizer_files(folder)
        if (folder / CONFIG).exists():
            load_config(name, trust_remote_code=trust_remote_code)  # which the tokenizer's class depends on
    with opening("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, name)
    return tokenizer


def load_config(
    name: str, what: str = f"{CONFIG} of", *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedConfig:
    """The configuration of a Hub name or folder. Raises ModelError if it cannot be opened or describes no model."""
    folder = model_folder(name)
    if folder is not None:
        read_object(folder / CONFIG)
    with opening(what, name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    check_config(config, name)
    return config


def load_language_model(
    name: str, *, seq2seq: bool = False, in_4bit: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A language model in float32 on the CPU, without dropout.

    `in_4bit` quantises its linear layers, on the GPU if there is one; embeddings, norms and head stay float32. Without
    bitsandbytes it raises ResourceError. Adapters in a folder are merged into the model that they were trained on.
    """
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    what = "encoder-decoder" if seq2seq else "decoder-only language model"
    options = {"quantization_config": four_bit_config()} if in_4bit else {}
    model = _opened(auto, what, name, trust_remote_code=trust_remote_code, options=options)
    check_generation(model, name)
    keep_trainable(model)
    return disable_dropout(model)


def load_sequence_classifier(name: str, *, num_labels: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A classifier with `num_labels` scalar heads, float32 on the CPU. Raises ModelError if it cannot be opened."""
    settings = {"num_labels": num_labels, "problem_type": "regression"}
    auto = AutoModelForSequenceClassification
    return _opened(auto, "reward model", name, trust_remote_code=trust_remote_code, settings=settings)


def has_reward_head(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint contains a reward head; else opening a language model makes a random one."""
    names = config.architectures if isinstance(config.architectures, list | tuple) else [config.architectures]
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Sets every dropout probability to 0, so that train and eval mode are identical (Huang et al. 2024)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # probabilities passed to functional dropout, and layerdrop
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _opened(
    auto: Any,
    what: str,
    name: str,
    *,
    trust_remote_code: bool,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The checked model that the transformers class `auto` opens; `settings` change its configuration."""
    folder = model_folder(name)
    stored = check_model_files(folder) if folder is not None else {}
    if folder is not None and (folder / ADAPTER).exists():
        return _with_adapters_merged(auto, what, folder, trust_remote_code=trust_remote_code, settings=settings)
    config = load_config(name, trust_remote_code=trust_remote_code, **(settings or {}))
    has_head = what != "reward model" or has_reward_head(config)
    skeleton = None
    if folder is not None and not hasattr(config, "quantization_config"):
        skeleton = _skeleton(auto, what, name, config, trust_remote_code=trust_remote_code)
        check_size(skeleton, stored, folder)
    arguments = {"trust_remote_code": trust_remote_code, "dtype": torch.float32, "use_safetensors": True}
    arguments |= {"output_loading_info": True, **(settings or {}), **(options or {})}
    with opening(what, name):
        try:
            model, loaded = auto.from_pretrained(name, **arguments)
        except RuntimeError:
            if skeleton is not None and folder is not None:
                check_shapes(skeleton, stored, folder)
            raise
    check_keys(model, loaded, name, may_lack=not has_head)
    check_finite(model, name)
    return model


def _skeleton(auto: Any, what: str, name: str, config: Any, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model that a configuration describes, without memory for its weights."""
    with opening(what, name), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _with_adapters_merged(
    auto: Any, what: str, folder: Path, *, trust_remote_code: bool, settings: dict[str, Any] | None
) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    base = read_object(folder / ADAPTER)["base_model_name_or_path"]
    model = _opened(auto, what, base, trust_remote_code=trust_remote_code, settings=settings)
    with opening(f"adapters for '{base}' in", str(folder)):
        adapted = PeftModel.from_pretrained(model, folder)
        needed = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    found = check_safetensors(folder / "adapter_model.safetensors")
    if needed != {name: tensor.shape for name, tensor in found.items()}:
        raise ModelError(f"The adapters in '{folder}' were not made for the model '{base}', which they name.")
    check_finite(adapted, str(folder))
    return merged(adapted)

"""TRL's language models with a value head, which is the head of this project's critic."""

import copy
import json
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import cached_file

from deep_rlhf.models.files import ADAPTER, check_model_files, model_folder
from deep_rlhf.models.saving import write_folder
from deep_rlhf.models.validation import check_keys, opening
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.runtime.hub import push_folder

logger = logging.getLogger(__name__)

HEAD_FILE = "v_head.safetensors"
_HEAD = "v_head."
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class ValueHead(nn.Module):
    """One linear layer on hidden states, in float32; values start at exactly 0 (Ziegler et al. 2019)."""

    def __init__(self, hidden_size: int, strategy: str | None, initializer_range: float) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.bias)
        if strategy is None:
            nn.init.zeros_(self.summary.weight)
        elif strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
        else:
            raise ValueError(f"v_head_init_strategy must be None (zeros) or 'normal', not {strategy!r}.")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [..., H] -> values [..., 1]."""
        return self.summary(hidden_states.to(self.summary.weight.dtype))


class PreTrainedModelWrapper(nn.Module):
    """A transformers model, or one with peft adapters, and a value head beside it."""

    transformers_parent_class: ClassVar[Any]
    states: ClassVar[str]  # name of the model output with the hidden states that the value head reads

    def __init__(
        self,
        pretrained_model: Any,
        *,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
        summary_dropout_prob: float = 0.0,
    ) -> None:
        """`pretrained_model` is a transformers.PreTrainedModel or a peft.PeftModel. Raises ValueError otherwise.

        `summary_dropout_prob` has no effect: training is without dropout.
        """
        super().__init__()
        self.is_peft_model = _is_peft(pretrained_model)
        if not (self.is_peft_model or isinstance(pretrained_model, PreTrainedModel)):
            raise ValueError(
                "pretrained_model_name_or_path should be a string or a PreTrainedModel, but is"
                f" {type(pretrained_model)}"
            )
        embeddings = pretrained_model.get_output_embeddings()
        if embeddings is None:
            raise ValueError("The model does not have a language model head, please use a model that has one.")
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.v_head = ValueHead(embeddings.weight.shape[1], v_head_init_strategy, v_head_initializer_range)
        self.v_head.to(embeddings.weight.device)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, peft_config: Any = None, **kwargs: Any
    ) -> "PreTrainedModelWrapper":
        """A model by name or folder (safetensors only), or around a model object; `peft_config` adds adapters.

        Takes `is_trainable` for a folder of adapters, `v_head_init_strategy`, `v_head_initializer_range`; other
        arguments are transformers'. A head saved beside the model is restored. Raises ModelError for a model that
        cannot be opened, and ValueError for arguments.
        """
        head_options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("v_head_", "summary_"))}
        if kwargs.pop("reward_adapter", None) is not None:
            raise ValueError("A reward_adapter is not supported: open the reward model by itself and give its scores.")
        trainable = kwargs.pop("is_trainable", False)
        name = pretrained_model_name_or_path
        model = cls._opened(name, model_args, kwargs, trainable=trainable) if isinstance(name, str) else name
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        wrapper = cls(model, **head_options)
        if isinstance(name, str):
            with opening("value head", name):
                saved = _saved_head(name, {key: kwargs[key] for key in _WHERE if key in kwargs})
            if saved:
                wrapper.v_head.load_state_dict(saved)
        return wrapper

    @classmethod
    def _opened(cls, name: str, arguments: tuple[Any, ...], options: dict[str, Any], *, trainable: bool) -> Any:
        given = {"dtype", "torch_dtype"} & options.keys()
        options = {"use_safetensors": True} | ({} if given else {"dtype": torch.float32}) | options
        if not options["use_safetensors"]:
            raise ValueError("Only safetensors weights are opened: leave use_safetensors out.")
        where = {key: options[key] for key in _WHERE if key in options}
        with opening("model", name):
            has_adapters = _file(name, ADAPTER, where) is not None
        if not has_adapters:
            return cls._language_model(name, arguments, options)
        from peft import PeftConfig, PeftModel

        with opening("adapters", name):
            base = PeftConfig.from_pretrained(name, **where).base_model_name_or_path
        model = cls._language_model(base, arguments, options)
        with opening("adapters", name):
            return PeftModel.from_pretrained(model, name, is_trainable=trainable, **where)

    @classmethod
    def _language_model(cls, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> PreTrainedModel:
        if (folder := model_folder(name)) is not None:
            check_model_files(folder / options.get("subfolder", ""))
        with opening("model", name):
            model, loaded = cls.transformers_parent_class.from_pretrained(
                name, *arguments, output_loading_info=True, **options
            )
        loaded["unexpected_keys"] = {key for key in loaded["unexpected_keys"] if not key.startswith(_HEAD)}
        check_keys(model, loaded, name, may_lack=False)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(logits [n, L, V] in float32, loss or None, values [n, L]), and the cache if asked for."""
        kwargs["output_hidden_states"] = True
        output = self.pretrained_model(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        values = self.v_head(getattr(output, self.states)[-1]).squeeze(-1)
        result = (output.logits.float(), output.loss, values)
        return (*result, output.past_key_values) if return_past_key_values else result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enables the model's activation checkpointing, also for trainers made afterwards."""
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Disables the model's activation checkpointing."""
        self.pretrained_model.gradient_checkpointing_disable()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's weights under its own names, and the head's under `v_head.`."""
        head = {_HEAD + name: tensor for name, tensor in self.v_head.state_dict().items()}
        return {**self.pretrained_model.state_dict(*args, **kwargs), **head}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a plain transformers folder (or peft's, for adapters), and the value head in a separate file.

        Raises NotFiniteError if a weight is NaN or infinite, and ResourceError if a file cannot be written; an earlier
        model in the folder then stays as it was.
        """
        check_finite(self, f"The model is not saved in '{save_directory}'")
        head = {_HEAD + name: tensor.detach().cpu().clone() for name, tensor in self.v_head.state_dict().items()}

        def write(folder: Path) -> None:
            self.pretrained_model.save_pretrained(folder, **kwargs)
            save_file(head, folder / HEAD_FILE)

        write_folder("model", save_directory, write)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Uploads the folder of `save_pretrained`; options as in `runtime.hub.push_folder`."""
        push_saved(self.save_pretrained, repo_id=repo_id, **kwargs)


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model with a value head."""

    transformers_parent_class = AutoModelForCausalLM
    states = "hidden_states"


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder such as T5 with a value head on its decoder."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    states = "decoder_hidden_states"


def create_reference_model(
    model: PreTrainedModelWrapper, num_shared_layers: int | None = None, pattern: str | None = None
) -> PreTrainedModelWrapper:
    """A frozen copy. The first `num_shared_layers` layers and all before them are frozen in `model`, too, and shared.

    `pattern` is the name of a layer's weights with {layer} for its number, e.g. "transformer.h.{layer}". Raises
    ValueError if no weight's name matches.
    """
    shared: list[Tensor] = []
    if num_shared_layers is not None:
        own = re.escape((pattern or "").format(layer=num_shared_layers))
        known = own or rf"\.(h|layers|block|blocks)\.{num_shared_layers}"
        named = list(model.named_parameters())
        first = next((i for i, (name, _) in enumerate(named) if re.search(rf"{known}\.", name)), None)
        if first is None:
            raise ValueError(f"Layer pattern could not be matched: no weight belongs to a layer {num_shared_layers}.")
        shared = [parameter.requires_grad_(False) for _, parameter in named[:first]]
    return copy.deepcopy(model, {id(parameter): parameter for parameter in shared}).requires_grad_(False).eval()


def push_saved(save: Callable[[str], None], **options: Any) -> None:
    """Uploads the folder that `save(folder)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        push_folder(folder, **options)


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _file(name: str, file: str, where: dict[str, Any]) -> str | None:
    """The path of a file in a folder or Hub repository; None if it does not exist."""
    return cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )


def _saved_head(name: str, where: dict[str, Any]) -> dict[str, Tensor]:
    """The value head's weights from its own file or from the model's files (TRL ≥ 0.8); empty if there are none."""
    candidates = [HEAD_FILE, "model.safetensors"]
    index = _file(name, "model.safetensors.index.json", where)
    if index is not None:
        weights = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        candidates += sorted({file for weight, file in weights.items() if weight.startswith(_HEAD)})
    for candidate in candidates:
        path = _file(name, candidate, where)
        if path is None:
            continue
        with safe_open(path, framework="pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(_HEAD)]  # noqa: SIM118 (no mapping)
            head = {key.removeprefix(_HEAD): tensors.get_tensor(key) for key in keys}
        if head:
            return head
    return {}

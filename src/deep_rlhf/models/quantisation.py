"""4-bit layers below trainable adapters: NF4 with double quantisation by bitsandbytes (QLoRA, Dettmers et al. 2023).

bitsandbytes is imported only if a model has such layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deep_rlhf.extras import optional_packages


def four_bit_config() -> BitsAndBytesConfig:
    """The quantisation settings for from_pretrained. Raises ResourceError without bitsandbytes."""
    with optional_packages("load_in_4bit"):
        import bitsandbytes  # noqa: F401
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def is_four_bit(model: Any) -> bool:
    """Whether a transformers model, plain or with adapters, was loaded in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """The quantised layers of a model, by name."""
    if not any(is_four_bit(module) for module in model.modules()):
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def keep_trainable(model: nn.Module) -> None:
    """Prevents a CPU from repacking the layers for inference, which would stop gradients through them."""
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def compute_four_bit_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the dtype in which the quantised layers multiply."""
    for layer in four_bit_layers(model).values():
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype


def unpack_four_bit(model: PreTrainedModel, deltas: Mapping[str, Tensor]) -> PreTrainedModel:
    """Replaces the quantised layers of `model` by plain ones with the same weights, in place and on the CPU.

    `deltas` {layer name: [out, in]} are added to the weights before these are rounded to the layer's dtype.
    """
    for name, layer in four_bit_layers(model).items():
        model.set_submodule(name, _unpacked(layer, deltas.get(name)))
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model.to("cpu")


def _unpacked(layer: Any, delta: Tensor | None) -> nn.Module:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if delta is not None:
        weight = (weight.float() + delta).to(weight.dtype)
    with torch.device("meta"):
        if issubclass(layer.source_cls, Conv1D):  # GPT-2's, which transformers transposed to quantise it
            plain: nn.Module = Conv1D(layer.out_features, layer.in_features)
            weight = weight.t().contiguous()
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight.cpu(), requires_grad=False)
    plain.bias = layer.bias
    return plain

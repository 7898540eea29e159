"""LoRA adapters by peft: small trainable matrices added to frozen weights (Hu et al. 2021)."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from deep_rlhf.models.quantisation import is_four_bit, unpack_four_bit


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: float, task_type: str, modules_to_save: list[str] | None = None
) -> Any:
    """Wraps `model` in a peft.PeftModel whose only trainable weights are the adapters and `modules_to_save`.

    The target layers are peft's defaults for the architecture, or else every linear layer. task_type is one of peft's:
    "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", …
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS

    known = model.config.model_type in KNOWN_TARGETS
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=None if known else "all-linear",
        modules_to_save=modules_to_save,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its layers are Conv1D, stored [in, out]
        task_type=task_type,
    )
    return get_peft_model(model, config)


def merged(peft_model: Any) -> PreTrainedModel:
    """A plain transformers copy with the adapters merged into the weights; the original is unchanged.

    A copy of a 4-bit model has dequantised weights, on the CPU, so it computes the same as the trained model.
    """
    if not is_four_bit(peft_model.get_base_model()):
        return copy.deepcopy(peft_model).merge_and_unload()
    layers = dict(peft_model.get_base_model().named_modules())
    with torch.no_grad():
        deltas = {
            name: layer.get_delta_weight(adapter)
            for name, layer in layers.items()
            for adapter in getattr(layer, "lora_A", ())
        }
    return unpack_four_bit(copy.deepcopy(peft_model).unload(), deltas)

"""Saves a model with its tokenizer: the one way in which weights reach a folder that other programs open."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.runtime.finite import check_finite


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a plain transformers folder: configuration, weights as safetensors, and tokenizer.

    Raises NotFiniteError, and writes nothing, if a weight is NaN or infinite.
    """
    check_finite(model, f"The model is not saved in '{folder}'")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

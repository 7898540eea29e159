"""Checks of an architecture when it is opened: do its hidden states give its outputs, and is it causal?

They run the model on two tokens. A model that fails is refused, so that no shortcut computes something else.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deep_rlhf.errors import ModelError, NotFiniteError
from deep_rlhf.models.trunk import Trunk
from deep_rlhf.models.validation import opening
from deep_rlhf.runtime.finite import check_finite


@torch.no_grad()
def check_language_model(trunk: Trunk, head: Callable[[Tensor], Tensor]) -> None:
    """Raises ModelError unless `head` maps the trunk's hidden states [..., H] to the model's own logits [..., V].

    A decoder-only model must be causal, too. Raises NotFiniteError for a weight or logit that is NaN or infinite.
    """
    model, tolerance = trunk.language_model, _tolerance(trunk)
    check_finite(model, "The model cannot be used")
    ids, other_end = _two_texts(1, trunk.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    extra = {"decoder_input_ids": ids} if trunk.is_seq2seq else {}
    with opening("language model", model.name_or_path or model.config.model_type):
        logits = model(input_ids=ids, attention_mask=mask.long(), **extra).logits
    if not bool(logits.isfinite().all()):
        raise NotFiniteError(
            f"The model '{model.name_or_path or model.config.model_type}' computes logits that are not finite: its"
            " weights or its config.json are damaged, or its number format is too small for them."
        )
    if trunk.is_seq2seq:
        states = trunk.run_trunk(ids, mask, encoder_hidden_states=trunk.encode(ids, mask), use_cache=False)
    else:
        states = trunk.run_trunk(ids, mask, use_cache=False)
        other_logits = model(input_ids=other_end, attention_mask=mask.long()).logits
        if not torch.allclose(other_logits[:, 0], logits[:, 0], atol=tolerance, rtol=tolerance):
            raise ModelError(
                f"The architecture '{model.config.model_type}' is not causal (its logits depend on later tokens), so it"
                " cannot generate text: use a decoder (GPT-2, Llama, …), or an encoder-decoder with use_seq2seq."
            )
    if not torch.allclose(head(states), logits, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"The architecture '{model.config.model_type}' computes its logits in an unsupported way: use a model whose"
            " logits are its output embeddings applied to the last hidden state."
        )


@torch.no_grad()
def is_causal_classifier(trunk: Trunk, score: nn.Linear) -> bool:
    """Whether the classifier's output is `score` applied to the last state, and no state depends on later tokens."""
    if trunk.is_seq2seq:
        return False
    ids, other_end = _two_texts(3, trunk.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    states = trunk.run_trunk(ids, mask, use_cache=False)
    other_states = trunk.run_trunk(other_end, mask, use_cache=False)
    outputs = trunk.language_model(input_ids=ids, attention_mask=mask.long()).logits
    pairs = ((states[:, 0], other_states[:, 0]), (score(states[:, 1]), outputs))
    return all(torch.allclose(found, expected, atol=_tolerance(trunk)) for found, expected in pairs)


def _two_texts(first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [1, 2] of two texts that differ in their second token only."""
    ids, other_end = torch.tensor([[first, first + 1], [first, first + 2]], device=device).split(1)
    return ids, other_end


def _tolerance(trunk: Trunk) -> float:
    return 1e-4 if trunk.language_model.dtype == torch.float32 else 5e-2

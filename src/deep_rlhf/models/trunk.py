"""A transformer without its output layer: token ids in, hidden states out. Policy and critic are built on it."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deep_rlhf.accel.cpu.kernels import use_fast_kernels
from deep_rlhf.models.load import disable_dropout


def position_ids(mask: Tensor) -> Tensor:
    """Positions [n, L] that count real tokens only: the exclusive cumulative sum of the mask (Huang et al. 2024)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Trunk(nn.Module):
    """A decoder-only or encoder-decoder model, plain or with adapters, up to its last hidden states."""

    def __init__(self, model: Any) -> None:
        """`model`, a transformers model or a peft.PeftModel around one, is changed: no dropout, fast kernels."""
        super().__init__()
        use_fast_kernels(model)
        self.model = disable_dropout(model).eval()  # some models read dropout from their configuration
        self.is_adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        self.is_seq2seq: bool = bool(self.language_model.config.is_encoder_decoder)
        self._checkpoints = False
        self._takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, with adapter layers inside if there are adapters."""
        return self.model.get_base_model() if self.is_adapted else self.model

    @property
    def trunk(self) -> nn.Module:
        """The module that maps (decoder) token ids to hidden states."""
        model = self.language_model
        return model.get_decoder() if self.is_seq2seq else model.base_model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.language_model.get_input_embeddings().weight.dtype

    def checkpoint_activations(self) -> None:
        """Turns on activation checkpointing: the backward pass recomputes activations (Chen et al. 2016)."""
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpoints = True

    def encode(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Encoder states [n, P, H] of an encoder-decoder's prompts."""
        self._set_mode()
        encoder = self.language_model.get_encoder()
        return encoder(input_ids=prompt_ids, attention_mask=prompt_mask.long()).last_hidden_state

    def run_trunk(self, input_ids: Tensor, mask: Tensor, **extra: Any) -> Tensor:
        """Hidden states [n, L, H] of input_ids [n, L]; `mask` [n, cached + L] covers cached tokens, too."""
        self._set_mode()
        if self._takes_positions and not self.is_seq2seq:
            extra["position_ids"] = position_ids(mask)[:, -input_ids.shape[1] :]
        return self.trunk(input_ids=input_ids, attention_mask=mask.long(), **extra).last_hidden_state

    def start_ids(self, count: int) -> Tensor:
        """The decoder start token of an encoder-decoder, [count, 1]."""
        start = self.language_model.config.decoder_start_token_id
        return torch.full((count, 1), start, dtype=torch.int64, device=self.device)

    def states(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """The hidden state before each response token, by teacher forcing.

        prompt_ids, prompt_mask [n, P]; response_ids, response_mask [n, R] -> [n, R, H].
        """
        previous_ids, previous_mask = response_ids[:, :-1], response_mask[:, :-1]
        if self.is_seq2seq:
            start = self.start_ids(len(prompt_ids))
            return self.run_trunk(
                torch.cat([start, previous_ids], 1),
                torch.cat([torch.ones_like(start, dtype=torch.bool), previous_mask], 1),
                encoder_hidden_states=self.encode(prompt_ids, prompt_mask),
                encoder_attention_mask=prompt_mask.long(),
                use_cache=False,
            )
        input_ids = torch.cat([prompt_ids, previous_ids], 1)
        hidden = self.run_trunk(input_ids, torch.cat([prompt_mask, previous_mask], 1), use_cache=False)
        return hidden[:, prompt_ids.shape[1] - 1 :]

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _set_mode(self) -> None:
        """transformers checkpoints activations in train mode only, and refuses a key/value cache there."""
        if self._checkpoints:
            self.model.train(torch.is_grad_enabled())

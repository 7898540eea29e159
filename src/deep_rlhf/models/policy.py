"""The policy: a language model with a scalar value head on its own trunk.

One trunk serves both (as in Ziegler et al. 2019's successors and TRL ≤ 0.11): the value of a state is a linear read-out
of the same hidden state that the next token is drawn from. Logits are never materialised for a whole batch: the trunk
gives hidden states, and `head` turns as few of them as the caller likes into logits.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deep_rlhf.models.adapters import merged
from deep_rlhf.models.load import disable_dropout
from deep_rlhf.ops.logprobs import chunked_token_logprobs
from deep_rlhf.types import UserError

LOGITS_AT_ONCE = 8_388_608  # 32 MB in float32; larger chunks were slower on a CPU (page faults), not faster


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only: the exclusive cumulative sum of the mask [n, L] (Huang et al. 2024)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Policy(nn.Module):
    """A decoder-only or encoder-decoder language model (plain, or a peft model) and a value head that starts at 0."""

    def __init__(self, model: Any) -> None:
        """`model` is a transformers model or a peft.PeftModel around one; its dropout is switched off.

        Raises UserError if the model's logits are not those of its output embeddings, so no shortcut is ever wrong.
        """
        super().__init__()
        self.model = disable_dropout(model).eval()  # a few models read dropout from their configuration
        self.is_adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        self.is_seq2seq: bool = bool(self.language_model.config.is_encoder_decoder)
        embeddings = self.language_model.get_output_embeddings()
        self.value_head = nn.Linear(embeddings.weight.shape[1], 1, device=embeddings.weight.device)
        nn.init.zeros_(self.value_head.weight)  # Ziegler et al. 2019: values start at exactly 0
        nn.init.zeros_(self.value_head.bias)
        self._takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self._check_head()

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, with adapter layers inside if there are adapters."""
        return self.model.get_base_model() if self.is_adapted else self.model

    @property
    def trunk(self) -> nn.Module:
        """What turns (decoder) token ids into hidden states."""
        model = self.language_model
        return model.get_decoder() if self.is_seq2seq else model.base_model

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> logits [..., V], as the model's own forward computes them."""
        model, config = self.language_model, self.language_model.config
        if getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * model.model_dim**-0.5
        logits = model.get_output_embeddings()(hidden)
        scale = getattr(config, "logit_scale", None) or 1.0  # MPT's may be None
        logits = logits * scale / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def encode(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Encoder states [n, P, H] of an encoder-decoder's prompts."""
        encoder = self.language_model.get_encoder()
        return encoder(input_ids=prompt_ids, attention_mask=prompt_mask.long()).last_hidden_state

    def run_trunk(self, input_ids: Tensor, mask: Tensor, **extra: Any) -> Tensor:
        """Hidden states [n, L, H] of the last L ids; `mask` covers cached tokens too."""
        if self._takes_positions and not self.is_seq2seq:
            extra["position_ids"] = position_ids(mask)[:, -input_ids.shape[1] :]
        return self.trunk(input_ids=input_ids, attention_mask=mask.long(), **extra).last_hidden_state

    def start_ids(self, count: int) -> Tensor:
        """[count, 1]: the token an encoder-decoder's responses begin after."""
        start = self.language_model.config.decoder_start_token_id
        return torch.full((count, 1), start, dtype=torch.int64, device=self.device)

    def states(self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """The hidden state before each response token, teacher-forced.

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

    def values(self, states: Tensor) -> Tensor:
        """Value of each state [..., H] -> [...]."""
        return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)

    def logprobs(self, states: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
        """log π(token | state) [n, R] in nats for the real tokens, 0 elsewhere; logits are divided by `temperature`."""
        vocabulary = self.language_model.get_output_embeddings().weight.shape[0]
        real = chunked_token_logprobs(
            states[response_mask],
            self.head,
            response_ids[response_mask],
            temperature=temperature,
            chunk_size=max(1, LOGITS_AT_ONCE // vocabulary),
        )
        return torch.zeros(response_mask.shape, device=real.device).masked_scatter(response_mask, real)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def plain_model(self) -> PreTrainedModel:
        """The language model as plain transformers saves and opens it: adapters merged in, no value head."""
        return merged(self.model) if self.is_adapted else self.model

    @torch.no_grad()
    def _check_head(self) -> None:
        model = self.language_model
        ids, other_end = torch.tensor([[1, 2], [1, 3]], device=self.device).split(1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if self.is_seq2seq:
            own = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=ids).logits
            states = self.run_trunk(ids, mask, encoder_hidden_states=self.encode(ids, mask), use_cache=False)
        else:
            own = model(input_ids=ids, attention_mask=mask.long()).logits
            states = self.run_trunk(ids, mask, use_cache=False)
            other = model(input_ids=other_end, attention_mask=mask.long()).logits
            if not torch.allclose(other[:, 0], own[:, 0], atol=1e-4, rtol=1e-4):
                raise UserError(
                    f"The architecture '{model.config.model_type}' reads ahead, so it cannot write: use a decoder"
                    " (GPT-2, Llama, …), or an encoder-decoder with use_seq2seq."
                )
        if not torch.allclose(self.head(states), own, atol=1e-4, rtol=1e-4):
            raise UserError(
                f"The architecture '{model.config.model_type}' computes its logits in a way this project does not know:"
                " use a model whose logits are its output embeddings applied to the last hidden state."
            )


class Reference:
    """The frozen model that the KL penalty is measured from: a copy, or an adapted policy with its adapters off."""

    def __init__(self, policy: Policy) -> None:
        """Copies the policy as it is now, unless its adapters can be switched off (then it costs no memory)."""
        self._policy = policy if policy.is_adapted else copy.deepcopy(policy).requires_grad_(False)

    @contextmanager
    def model(self) -> Iterator[Policy]:
        """The reference as a Policy, without gradients."""
        with torch.no_grad():
            if self._policy.is_adapted:
                with self._policy.model.disable_adapter():
                    yield self._policy
            else:
                yield self._policy

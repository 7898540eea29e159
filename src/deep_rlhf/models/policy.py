"""The policy: a language model whose logits are never materialised for a whole batch.

The trunk gives hidden states, and `head` turns as few of them as the caller likes into logits.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deep_rlhf.errors import UserError
from deep_rlhf.models.adapters import merged
from deep_rlhf.models.trunk import Trunk
from deep_rlhf.ops.logprobs import chunked_kl_full, chunked_logprobs_and_entropy, chunked_token_logprobs

# Of the logits held at once, which a training pass keeps until its backward pass.
LOGIT_BYTES = {"cpu": 64 * 2**20}
LOGIT_BYTES_OF_GPU = 2**30


class Policy(Trunk):
    """A decoder-only or encoder-decoder language model, plain or with adapters."""

    def __init__(self, model: Any) -> None:
        """`model` is a transformers model or a peft.PeftModel around one; its dropout is switched off.

        Raises UserError if the model's logits are not those of its output embeddings, so no shortcut is ever wrong.
        """
        super().__init__(model)
        self._check_head()

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> logits [..., V], as the model's own forward computes them."""
        model, config = self.language_model, self.language_model.config
        if getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * model.model_dim**-0.5
        logits = model.get_output_embeddings()(hidden)
        scale = getattr(config, "logit_scale", None) or 1.0  # MPT's may be None
        scale /= getattr(config, "logits_scaling", 1.0)
        if scale != 1.0:
            logits = logits * scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def logprobs(self, states: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
        """log π(token | state) [n, R] in nats for the real tokens, 0 elsewhere; logits are divided by `temperature`."""
        real = chunked_token_logprobs(
            states[response_mask],
            self.head,
            response_ids[response_mask],
            temperature=temperature,
            chunk_size=self.chunk_size,
        )
        return _scattered(real, response_mask)

    def logprobs_and_entropy(
        self, states: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """`logprobs`, and the entropy [n, R] in nats of the distribution each token is drawn from."""
        logprobs, entropy = chunked_logprobs_and_entropy(
            states[response_mask],
            self.head,
            response_ids[response_mask],
            temperature=temperature,
            chunk_size=self.chunk_size,
        )
        return _scattered(logprobs, response_mask), _scattered(entropy, response_mask)

    @property
    def chunk_size(self) -> int:
        """Tokens whose logits are held at once."""
        return self.chunk_size_of(LOGIT_BYTES.get(self.device.type, LOGIT_BYTES_OF_GPU))

    def chunk_size_of(self, logit_bytes: int) -> int:
        """`chunk_size` where so many bytes may be held."""
        vocabulary = self.language_model.get_output_embeddings().weight.shape[0]
        return max(1, logit_bytes // (vocabulary * self.dtype.itemsize))

    def plain_model(self) -> PreTrainedModel:
        """The language model as plain transformers saves and opens it: adapters merged in."""
        return merged(self.model) if self.is_adapted else self.model

    @torch.no_grad()
    def _check_head(self) -> None:
        model = self.language_model
        tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
        ids, other_end = torch.tensor([[1, 2], [1, 3]], device=self.device).split(1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if self.is_seq2seq:
            own = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=ids).logits
            states = self.run_trunk(ids, mask, encoder_hidden_states=self.encode(ids, mask), use_cache=False)
        else:
            own = model(input_ids=ids, attention_mask=mask.long()).logits
            states = self.run_trunk(ids, mask, use_cache=False)
            other = model(input_ids=other_end, attention_mask=mask.long()).logits
            if not torch.allclose(other[:, 0], own[:, 0], atol=tolerance, rtol=tolerance):
                raise UserError(
                    f"The architecture '{model.config.model_type}' reads ahead, so it cannot write: use a decoder"
                    " (GPT-2, Llama, …), or an encoder-decoder with use_seq2seq."
                )
        if not torch.allclose(self.head(states), own, atol=tolerance, rtol=tolerance):
            raise UserError(
                f"The architecture '{model.config.model_type}' computes its logits in a way this project does not know:"
                " use a model whose logits are its output embeddings applied to the last hidden state."
            )


class Reference:
    """The frozen model that the KL penalty is measured from: a copy, or an adapted policy with its adapters off."""

    def __init__(self, policy: Policy, *, frozen: Policy | None = None) -> None:
        """Copies the policy as it is now, unless its adapters can be switched off (then it costs no memory).

        `frozen`, a model without adapters, is the reference itself where there is one already; it may compute in
        another format and on another device than the policy.
        """
        if frozen is not None:
            self._policy = frozen.requires_grad_(False)
        else:
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

    def look(
        self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The states [n, R, H] before each response token, where the reference is, and log π₀(token) [n, R] in nats.

        The log-probabilities are where the ids are; they are 0 outside the mask.
        """
        with self.model() as frozen:
            ids, mask = response_ids.to(frozen.device), response_mask.to(frozen.device)
            states = frozen.states(prompt_ids.to(frozen.device), prompt_mask.to(frozen.device), ids, mask)
            return states, frozen.logprobs(states, ids, mask, temperature).to(response_ids.device)

    @torch.no_grad()
    def kl(
        self, policy: Policy, states: Tensor, ref_states: Tensor, response_mask: Tensor, temperature: float
    ) -> Tensor:
        """Exact KL(policy ‖ reference) in nats of each response token's distribution, [n, R], 0 outside the mask.

        states and ref_states [n, R, H] are those of policy and reference, each on its device.
        """

        def ref_head(hidden: Tensor) -> Tensor:
            with self.model() as frozen:
                return frozen.head(hidden).to(policy.device)

        real = chunked_kl_full(
            states[response_mask],
            policy.head,
            ref_states[response_mask.to(ref_states.device)],
            ref_head,
            temperature=temperature,
            chunk_size=policy.chunk_size,
        )
        return _scattered(real, response_mask)


def _scattered(real: Tensor, mask: Tensor) -> Tensor:
    """Values [M] of the real tokens put back in their places [n, R], 0 elsewhere."""
    return torch.zeros(mask.shape, device=real.device).masked_scatter(mask, real)

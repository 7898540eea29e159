"""The policy and the reference model: language models whose logits are never held for a whole batch.

The trunk returns hidden states, and `head` turns a chunk of them at a time into logits.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deep_rlhf.models.adapters import merged
from deep_rlhf.models.checks import check_language_model
from deep_rlhf.models.trunk import Trunk
from deep_rlhf.ops.logprobs import chunked_kl_full, chunked_logprobs_and_entropy, chunked_token_logprobs

# Bytes of the logits held at once; a training pass keeps them until its backward pass.
LOGIT_BYTES = {"cpu": 64 * 2**20}
LOGIT_BYTES_OF_GPU = 2**30


class Policy(Trunk):
    """A decoder-only or encoder-decoder language model, plain or with adapters."""

    def __init__(self, model: Any) -> None:
        """`model` is a transformers model or a peft.PeftModel around one; its dropout is disabled.

        Raises ModelError if the model is not causal, or if its logits are not its output embeddings applied to the last
        hidden state.
        """
        super().__init__(model)
        check_language_model(self, self.head)

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
        """log π(token | state) [n, R] in nats, 0 outside the mask; the logits are divided by `temperature`."""
        real = chunked_token_logprobs(
            states[response_mask],
            self.head,
            response_ids[response_mask],
            temperature=temperature,
            chunk_size=self.chunk_size,
        )
        return _scatter(real, response_mask)

    def logprobs_and_entropy(
        self, states: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """`logprobs`, and the entropy [n, R] in nats of the distribution of each token."""
        logprobs, entropy = chunked_logprobs_and_entropy(
            states[response_mask],
            self.head,
            response_ids[response_mask],
            temperature=temperature,
            chunk_size=self.chunk_size,
        )
        return _scatter(logprobs, response_mask), _scatter(entropy, response_mask)

    @property
    def chunk_size(self) -> int:
        """Number of tokens whose logits are held at once."""
        return self.chunk_size_of(LOGIT_BYTES.get(self.device.type, LOGIT_BYTES_OF_GPU))

    def chunk_size_of(self, logit_bytes: int) -> int:
        """`chunk_size` for a budget of `logit_bytes`."""
        vocabulary = self.language_model.get_output_embeddings().weight.shape[0]
        return max(1, logit_bytes // (vocabulary * self.dtype.itemsize))

    def plain_model(self) -> PreTrainedModel:
        """The language model as plain transformers can save and open it, with adapters merged."""
        return merged(self.model) if self.is_adapted else self.model


class Reference:
    """The frozen model of the KL penalty: a copy of the policy, or the policy with its adapters disabled."""

    def __init__(self, policy: Policy, *, frozen: Policy | None = None) -> None:
        """Copies the policy's current weights, unless it has adapters to disable, which needs no memory.

        `frozen`, a model without adapters, is used as the reference itself; its dtype and device may differ from the
        policy's.
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

    def states_and_logprobs(
        self, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The states [n, R, H] before each response token, and log π_ref(token | state) [n, R] in nats.

        The states are on the reference's device, the log-probabilities on that of the ids and 0 outside the mask.
        """
        with self.model() as frozen:
            ids, mask = response_ids.to(frozen.device), response_mask.to(frozen.device)
            states = frozen.states(prompt_ids.to(frozen.device), prompt_mask.to(frozen.device), ids, mask)
            return states, frozen.logprobs(states, ids, mask, temperature).to(response_ids.device)

    @torch.no_grad()
    def kl(
        self, policy: Policy, states: Tensor, ref_states: Tensor, response_mask: Tensor, temperature: float
    ) -> Tensor:
        """Exact KL(policy ‖ reference) of each response token's distribution, [n, R] in nats, 0 outside the mask.

        states and ref_states [n, R, H] are those of policy and reference, each on its own device.
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
        return _scatter(real, response_mask)


def _scatter(real: Tensor, mask: Tensor) -> Tensor:
    """Puts the values [M] of the real tokens at their positions [n, R]; 0 elsewhere."""
    return torch.zeros(mask.shape, device=real.device).masked_scatter(mask, real)

"""From samples to a rollout: decode, and look at each token with policy, reference and critic."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deep_rlhf.models.critic import Critic
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.ops.kl import KLPenalty, kl_estimate
from deep_rlhf.rollout.passes import ForwardPasses
from deep_rlhf.rollout.records import select
from deep_rlhf.rollout.sampler import Sampled
from deep_rlhf.types import Completions, PromptBatch, Rollout


def prompt_batch(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, device: torch.device, *, left: bool = True
) -> PromptBatch:
    """Whole prompts as ids [B, P], padded on the left (on the right for an encoder, whose positions start there).

    The filling is id 0, whatever the tokenizer's padding is: the mask tells what is real, and every model has an id 0.
    """
    rows = tokenizer(texts).input_ids
    lengths = torch.tensor([[len(row)] for row in rows])
    columns = torch.arange(int(lengths.max()))
    mask = columns >= len(columns) - lengths if left else columns < lengths
    input_ids = torch.zeros(mask.shape, dtype=torch.int64)
    input_ids[mask] = torch.tensor([token for row in rows for token in row])
    return PromptBatch(texts=texts, input_ids=input_ids.to(device), mask=mask.to(device))


def complete(
    prompts: PromptBatch,
    sampled: Sampled,
    tokenizer: PreTrainedTokenizerBase,
    *,
    continues: bool = True,
    group: Tensor | None = None,
) -> Completions:
    """The sampled response to each prompt, as ids and as text without special tokens.

    `continues` is False for an encoder-decoder, whose response is a text of its own. `group` [N] tells which responses
    belong to one prompt; by default each stands alone.
    """
    response_ids = _real_ids(sampled.response_ids, sampled.response_mask)
    before = _real_ids(prompts.input_ids, prompts.mask) if continues else [[] for _ in response_ids]
    responses = [_text_after(tokenizer, *ids) for ids in zip(before, response_ids, strict=True)]
    return Completions(
        prompts=prompts.texts,
        responses=responses,
        prompt_ids=prompts.input_ids,
        prompt_mask=prompts.mask,
        response_ids=sampled.response_ids,
        response_mask=sampled.response_mask,
        sampler_logprobs=sampled.logprobs,
        entropy=sampled.entropy,
        finished=sampled.finished,
        group=(torch.arange(len(responses)) if group is None else group).to(sampled.response_ids.device),
    )


def needs_states(critic: Critic | None, kl_penalty: KLPenalty) -> bool:
    """Whether the policy's own states are looked at: by a critic that stands on them, or for the exact KL."""
    return kl_penalty == "full" or (critic is not None and critic.own_trunk is None)


def collect(
    completions: Completions,
    policy: Policy,
    reference: Reference,
    scores: Tensor,
    *,
    temperature: float,
    kl_penalty: KLPenalty = "kl",
    critic: Critic | None = None,
    states: Tensor | None = None,
    recompute: bool = True,
    max_rows: int | None = None,
) -> Rollout:
    """Adds what policy, reference and critic say of each token; no gradients.

    scores [N, K] are the members' rewards of each response. `states` [N, R, H], the policy's before each token, may be
    those it was sampled from. Without `recompute` the policy's log-probabilities are the sampler's, which its own
    forward only repeats. `max_rows` bounds the responses in one forward pass.
    """
    shape, device = completions.response_mask.shape, policy.device
    recompute = recompute or (states is None and needs_states(critic, kl_penalty))

    def look(parts: list[Tensor]) -> dict[str, Tensor]:
        seen = {name: torch.zeros(shape, device=device) for name in ("logprobs", "ref_logprobs", "kl", "values")}
        if not recompute:
            seen["logprobs"] = completions.sampler_logprobs
        for rows in parts:
            part = select(completions, rows)
            ids, mask = part.response_ids, part.response_mask
            context, width = (part.prompt_ids, part.prompt_mask, ids, mask), ids.shape[1]
            here = None if states is None else states[rows, :width]
            if recompute:
                here = policy.states(*context)
                seen["logprobs"][rows, :width] = policy.logprobs(here, ids, mask, temperature)
            if critic is not None:
                seen["values"][rows, :width] = torch.where(mask, critic(part, here), 0.0)
            ref_states, seen["ref_logprobs"][rows, :width] = reference.states_and_logprobs(*context, temperature)
            if kl_penalty == "full" and here is not None:
                seen["kl"][rows, :width] = reference.kl(policy, here, ref_states, mask, temperature)
        return seen

    with torch.no_grad():
        passes = ForwardPasses(policy, training=False, max_rows=max_rows)
        seen = passes.run(completions, torch.arange(shape[0], device=device), look)
    if kl_penalty != "full":
        seen["kl"] = kl_estimate(seen["logprobs"], seen["ref_logprobs"], kl_penalty)
    scores = scores.to(device)
    fields: dict[str, Any] = {name: getattr(completions, name) for name in Completions.__dataclass_fields__}
    return Rollout(
        **(fields | seen),
        scores=scores.mean(1),
        score_std=scores.std(1) if scores.shape[1] > 1 else torch.zeros_like(scores[:, 0]),
        shaped_scores=scores.mean(1),
    )


def _real_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The real ids of each row."""
    rows = ids[mask].split(mask.sum(1).tolist())
    return [row.tolist() for row in rows]


def _text_after(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], response_ids: list[int]) -> str:
    """The response as it reads after its prompt: alone, a SentencePiece tokenizer would lose its leading space."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode(prompt_ids + response_ids, skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(response_ids, skip_special_tokens=True)

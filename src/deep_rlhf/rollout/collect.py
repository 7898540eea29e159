"""From prompts to a rollout: sample, decode, and look at each token with policy, reference and critic."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deep_rlhf.data.batching import token_budget_batches
from deep_rlhf.models.critic import Critic
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.ops.kl import KLPenalty, kl_estimate
from deep_rlhf.rollout.records import select
from deep_rlhf.rollout.sampler import Sampler
from deep_rlhf.types import Completions, PromptBatch, Rollout

FORWARD_TOKENS = 8_192  # padded tokens in one forward pass


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
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    uniforms: Tensor,
    *,
    continues: bool = True,
    group: Tensor | None = None,
) -> Completions:
    """One sampled response to each prompt, as ids and as text without special tokens.

    `continues` is False for an encoder-decoder, whose response is a text of its own. `group` [N] tells which responses
    belong to one prompt; by default each stands alone.
    """
    sampled = sampler.sample(prompts, uniforms)
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


def collect(
    completions: Completions,
    policy: Policy,
    reference: Reference,
    scores: Tensor,
    *,
    temperature: float,
    kl_penalty: KLPenalty = "kl",
    critic: Critic | None = None,
    max_rows: int | None = None,
) -> Rollout:
    """Adds what policy, reference and critic say of each token; no gradients.

    scores [N, K] are the members' rewards of each response. `max_rows` bounds the responses in one forward pass.
    """
    shape, device = completions.response_mask.shape, policy.device
    logprobs, ref_logprobs, kl, values = (torch.zeros(shape, device=device) for _ in range(4))
    for rows in token_batches(completions, torch.arange(shape[0], device=device), max_rows):
        part = select(completions, rows)
        ids, mask = part.response_ids, part.response_mask
        width = ids.shape[1]
        with torch.no_grad():
            states = policy.states(part.prompt_ids, part.prompt_mask, ids, mask)
            logprobs[rows, :width] = policy.logprobs(states, ids, mask, temperature)
            if critic is not None:
                values[rows, :width] = torch.where(mask, critic(part, states), 0.0)
        with reference.model() as frozen:
            ref_states = frozen.states(part.prompt_ids, part.prompt_mask, ids, mask)
            ref_logprobs[rows, :width] = frozen.logprobs(ref_states, ids, mask, temperature)
        if kl_penalty == "full":
            kl[rows, :width] = reference.kl(policy, states, ref_states, mask, temperature)
    if kl_penalty != "full":
        kl = kl_estimate(logprobs, ref_logprobs, kl_penalty)
    scores = scores.to(device)
    fields = {name: getattr(completions, name) for name in Completions.__dataclass_fields__}
    return Rollout(
        **fields,
        scores=scores.mean(1),
        score_std=scores.std(1) if scores.shape[1] > 1 else torch.zeros_like(scores[:, 0]),
        shaped_scores=scores.mean(1),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=kl,
        values=values,
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


def token_batches(completions: Completions, rows: Tensor, max_rows: int | None = None) -> list[Tensor]:
    """`rows` cut into batches of like length, each of which one forward pass takes at once."""
    lengths = (completions.prompt_mask[rows].sum(1) + completions.response_mask[rows].sum(1)).tolist()
    batches = token_budget_batches(lengths, FORWARD_TOKENS)
    cut = [part for batch in batches for part in torch.tensor(batch, device=rows.device).split(max_rows or len(batch))]
    return [rows[part] for part in cut]

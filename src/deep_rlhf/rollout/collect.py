"""From samples to a rollout: decodes responses, and scores each token with policy, reference and critic."""

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
    """Tokenises whole prompts to ids [B, P], padded on the left (on the right for an encoder-decoder).

    The padding is id 0, whatever the tokenizer's padding is: it is masked out, and every model has an id 0.
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
    """Returns the sampled response to each prompt, as ids and as text without special tokens.

    `continues` is False for an encoder-decoder, whose response does not continue its prompt. Responses to one prompt
    share a number in `group` [N]; by default each response is a group of its own.
    """
    response_ids = _unpadded(sampled.response_ids, sampled.response_mask)
    prompt_ids = _unpadded(prompts.input_ids, prompts.mask) if continues else [[] for _ in response_ids]
    responses = [_response_text(tokenizer, *ids) for ids in zip(prompt_ids, response_ids, strict=True)]
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
    """Whether `collect` reads the policy's hidden states: for a critic without a trunk of its own, or the exact KL."""
    return kl_penalty == "full" or (critic is not None and critic.own_trunk is None)


def collect(
    completions: Completions,
    policy: Policy,
    reference: Reference,
    scores: Tensor,
    shaped_scores: Tensor,
    *,
    temperature: float,
    kl_penalty: KLPenalty = "kl",
    critic: Critic | None = None,
    states: Tensor | None = None,
    recompute: bool = True,
    max_rows: int | None = None,
) -> Rollout:
    """Adds scores, and the log-probabilities, KL and values of each response token, without gradients.

    scores [N, K] are the ensemble members', shaped_scores [N] the numbers to maximise. `states` [N, R, H] are the
    policy's hidden states before each token, if the sampler kept them. Without `recompute` the policy's
    log-probabilities are the sampler's, unless states are needed and missing. `max_rows` limits the responses of one
    forward pass.
    """
    shape, device = completions.response_mask.shape, policy.device
    recompute = recompute or (states is None and needs_states(critic, kl_penalty))

    def score_tokens(parts: list[Tensor]) -> dict[str, Tensor]:
        outputs = {name: torch.zeros(shape, device=device) for name in ("logprobs", "ref_logprobs", "kl", "values")}
        if not recompute:
            outputs["logprobs"] = completions.sampler_logprobs
        for rows in parts:
            part = select(completions, rows)
            ids, mask = part.response_ids, part.response_mask
            context, width = (part.prompt_ids, part.prompt_mask, ids, mask), ids.shape[1]
            part_states = None if states is None else states[rows, :width]
            if recompute:
                part_states = policy.states(*context)
                outputs["logprobs"][rows, :width] = policy.logprobs(part_states, ids, mask, temperature)
            if critic is not None:
                outputs["values"][rows, :width] = torch.where(mask, critic(part, part_states), 0.0)
            ref_states, outputs["ref_logprobs"][rows, :width] = reference.states_and_logprobs(*context, temperature)
            if kl_penalty == "full" and part_states is not None:
                outputs["kl"][rows, :width] = reference.kl(policy, part_states, ref_states, mask, temperature)
        return outputs

    with torch.no_grad():
        passes = ForwardPasses(policy, training=False, max_rows=max_rows)
        outputs = passes.run(completions, torch.arange(shape[0], device=device), score_tokens)
    if kl_penalty != "full":
        outputs["kl"] = kl_estimate(outputs["logprobs"], outputs["ref_logprobs"], kl_penalty)
    scores = scores.to(device)
    fields: dict[str, Any] = {name: getattr(completions, name) for name in Completions.__dataclass_fields__}
    return Rollout(
        **(fields | outputs),
        scores=scores.mean(1),
        score_std=scores.std(1) if scores.shape[1] > 1 else torch.zeros_like(scores[:, 0]),
        shaped_scores=shaped_scores.to(device),
    )


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row without its padding."""
    rows = ids[mask].split(mask.sum(1).tolist())
    return [row.tolist() for row in rows]


def _response_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], response_ids: list[int]) -> str:
    """Decodes a response together with its prompt: alone, a SentencePiece tokenizer would drop its leading space."""
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    text = tokenizer.decode(prompt_ids + response_ids, skip_special_tokens=True)
    if text.startswith(prompt):
        return text[len(prompt) :]
    return tokenizer.decode(response_ids, skip_special_tokens=True)

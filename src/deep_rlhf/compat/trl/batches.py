"""Converts the token tensors of TRL's scripts to the records of this project."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.passes import ForwardPasses
from deep_rlhf.rollout.records import select
from deep_rlhf.types import Completions


def checked(
    batch_size: int,
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    response_masks: list[Tensor] | None,
) -> tuple[list[Tensor], Tensor]:
    """The unmasked tokens of the responses, and the scores [N, 1]. Raises ValueError for invalid input."""
    named: dict[str, Any] = {"queries": queries, "responses": responses, "scores": scores}
    if response_masks is not None:
        named["response_masks"] = response_masks
    for name, tensors in named.items():
        if not isinstance(tensors, list):
            raise ValueError(f"{name} must be a list of tensors - got {type(tensors)}")
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"Elements in {name} must be tensors - got {type(tensor)}")
        if len(tensors) != batch_size:
            raise ValueError(
                f"Batch size ({batch_size}) does not match number of examples - but got {len(tensors)} for: {name}"
            )
    for name in ("queries", "responses"):
        for row, tensor in enumerate(named[name]):
            if tensor.dim() != 1 or len(tensor) == 0:
                raise ValueError(
                    f"Elements in {name} must be token ids [length], at least one - got shape"
                    f" {tuple(tensor.shape)} in number {row}"
                )
    for score in scores:
        if score.numel() != 1:
            raise ValueError(f"Scores must be 1-dimensional, one number each - got shape {tuple(score.shape)}")
    if response_masks is not None:
        responses = [_unmasked(*pair) for pair in zip(responses, response_masks, strict=True)]
    return responses, torch.stack([score.detach().float().reshape(1) for score in scores]).cpu()


def _unmasked(response: Tensor, mask: Tensor) -> Tensor:
    """The tokens under the mask. Raises ValueError unless the mask is 1 for the first tokens and 0 after them."""
    real = int(mask.sum())
    if mask.shape != response.shape or real == 0 or not bool(mask[:real].all()):
        raise ValueError(
            "A response mask must be as long as its response, 1 for its first tokens and 0 after them: tokens between"
            " those of the policy, as a text environment puts them, are not supported."
        )
    return response[:real]


def without_padding(response: Tensor, eos_ids: list[int], pad_id: int | None) -> Tensor:
    """The response [R] up to its first EOS, if only padding or further EOS tokens follow it."""
    ends = torch.isin(response, torch.tensor(eos_ids, device=response.device)).nonzero()
    if len(ends) == 0:
        return response
    end = int(ends[0]) + 1
    padding_ids = [*eos_ids, *([] if pad_id is None else [pad_id])]
    rest = torch.isin(response[end:], torch.tensor(padding_ids, device=response.device))
    return response[:end] if bool(rest.all()) else response


def make_completions(
    queries: list[Tensor],
    responses: list[Tensor],
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
) -> Completions:
    """Makes Completions from token ids; sampler_logprobs and entropy are zeros, to be filled in later."""
    prompt_ids, prompt_mask = padded(queries, policy.device, left=not policy.is_seq2seq)
    response_ids, response_mask = padded(responses, policy.device, left=False)
    last = torch.stack([response[-1] for response in responses]).to(policy.device)
    return Completions(
        prompts=tokenizer.batch_decode([query.tolist() for query in queries], skip_special_tokens=True),
        responses=tokenizer.batch_decode([response.tolist() for response in responses], skip_special_tokens=True),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        sampler_logprobs=torch.zeros(response_ids.shape, device=policy.device),
        entropy=torch.zeros(response_ids.shape, device=policy.device),
        finished=torch.isin(last, torch.tensor(eos_ids, device=policy.device)),
        group=torch.arange(len(queries), device=policy.device),
    )


@torch.no_grad()
def policy_entropy(completions: Completions, policy: Policy, temperature: float, max_rows: int | None) -> Tensor:
    """The entropy [N, R] in nats of the policy's distribution before each token, without gradients."""
    entropy = torch.zeros_like(completions.entropy)

    def score_tokens(parts: list[Tensor]) -> None:
        for rows in parts:
            part = select(completions, rows)
            ids, mask = part.response_ids, part.response_mask
            states = policy.states(part.prompt_ids, part.prompt_mask, ids, mask)
            entropy[rows, : ids.shape[1]] = policy.logprobs_and_entropy(states, ids, mask, temperature)[1]

    passes = ForwardPasses(policy, training=False, max_rows=max_rows)
    passes.run(completions, torch.arange(len(entropy), device=entropy.device), score_tokens)
    return entropy


def padded(rows: list[Tensor], device: torch.device, *, left: bool, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pads rows of ids to one tensor [n, L], and returns it with its mask, both on `device`."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.int64, device=device)
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = row.to(device)
        mask[i, columns] = True
    return ids, mask

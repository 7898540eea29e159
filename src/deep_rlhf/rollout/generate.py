"""Text from a policy, for looking at it and for comparing it; training samples come from `collect`."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.collect import complete, prompt_batch
from deep_rlhf.rollout.engine import Engine


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS, which SFT teaches, and those of the model's generation."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if own is None else [own] if isinstance(own, int) else own
    return sorted({*own, tokenizer.eos_token_id} - {None})


def sampling_uniforms(seed: int, draw: int, count: int, tokens: int) -> torch.Tensor:
    """The random numbers [count, tokens] of the `draw`-th batch of a run: the same whoever draws which rows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
    return torch.rand(count, tokens, generator=generator)


def generate_text(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """One sampled response to each text, without special tokens."""
    engine = Engine(
        policy,
        eos_ids=eos_token_ids(policy.language_model, tokenizer),
        temperature=temperature,
    )
    continues = not policy.is_seq2seq
    prompts = prompt_batch(texts, tokenizer, policy.device, left=continues)
    uniforms = sampling_uniforms(seed, 0, len(texts), max_new_tokens)
    return complete(prompts, engine.sample(prompts, uniforms), tokenizer, continues=continues).responses

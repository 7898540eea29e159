"""Generates text from a policy for display and comparison; training samples come from `collect`."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.models.policy import Policy
from deep_rlhf.rollout.collect import complete, prompt_batch
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.sampler import sampling_uniforms


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's EOS, which SFT teaches, and those of the generation config."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if own is None else [own] if isinstance(own, int) else own
    return sorted({*own, tokenizer.eos_token_id} - {None})


def generate_text(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Samples one response to each prompt in `texts`, as text without special tokens."""
    engine = Engine(
        policy,
        eos_ids=eos_token_ids(policy.language_model, tokenizer),
        temperature=temperature,
    )
    continues = not policy.is_seq2seq
    prompts = prompt_batch(texts, tokenizer, policy.device, left=continues)
    uniforms = sampling_uniforms(seed, 0, len(texts), max_new_tokens)
    return complete(prompts, engine.sample(prompts, uniforms), tokenizer, continues=continues).responses

"""A small world: questions and answers on everyday topics, generated with no network; `judge` is apart on purpose."""

from deep_rlhf.data.synthetic.answers import corpus, generate_answer, generate_prompts, sft_pairs

__all__ = ["corpus", "generate_answer", "generate_prompts", "sft_pairs"]

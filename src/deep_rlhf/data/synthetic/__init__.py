"""The synthetic task: questions and responses on everyday topics, generated from a seed.

`judge`, which scores responses, is not imported here: nothing that trains may use it.
"""

from deep_rlhf.data.synthetic.responses import corpus, generate_prompts, generate_response, sft_pairs

__all__ = ["corpus", "generate_prompts", "generate_response", "sft_pairs"]

"""The commands of `deep-rlhf`, with the line that the help prints for each."""

COMMANDS = {
    "demo": "end-to-end demo on built-in synthetic data: a few minutes, no network, no GPU",
    "teach": "compare responses in the browser while a small model learns from the labels",
    "label": "serve only the labelling page of teach, for one person or many",
    "loop": "run only the trainer of teach, on the same store",
    "store": "show, export and import the labels of a store",
    "reward": "train a reward model on preferences (also: python reward_modeling.py)",
    "ppo": "fine-tune a policy with PPO (also: python ppo.py)",
    "trpo": "fine-tune a policy with TRPO",
    "rloo": "fine-tune a policy with RLOO: leave-one-out baselines, no critic",
    "grpo": "fine-tune a policy with GRPO: group-relative advantages, no critic",
    "reinforce_plus_plus": "fine-tune a policy with REINFORCE++: no critic, no groups",
    "dpo": "fine-tune a policy with DPO: on preferences, no reward model, no sampling",
    "plan": "estimate the memory of a command before anything is loaded",
}
# The commands of cli/online.py, with the prefix of their classes: PPO stands for PPOConfig and PPOTrainer.
ALGORITHMS = {"ppo": "PPO", "trpo": "TRPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce_plus_plus": "ReinforcePlusPlus"}

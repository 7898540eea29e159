"""The critic: predicts the return from the hidden state before each response token.

Three kinds, all with a linear value head: `shared` uses the policy's own trunk (TRL ≤ 0.11) and needs no extra memory;
`separate` has a trunk of its own, initialised from the policy; `reward` is initialised from the reward model (Stiennon
et al. 2020; Huang et al. 2024).
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deep_rlhf.errors import ConfigError
from deep_rlhf.models.checks import is_causal_classifier
from deep_rlhf.models.policy import Policy
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.models.trunk import Trunk
from deep_rlhf.runtime.precision import cast_weights
from deep_rlhf.types import Completions, CriticKind, Scorer


class Critic(nn.Module):
    """A value head on the policy's trunk, or on a trunk of its own."""

    def __init__(self, head: nn.Linear, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.value_head = head
        self.own_trunk = trunk

    def forward(self, part: Completions, states: Tensor | None) -> Tensor:
        """Values [n, R] of the states before each response token.

        `states` [n, R, H] are the policy's; a critic with its own trunk does not need them.
        """
        if self.own_trunk is not None:
            states = self.own_trunk.states(part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
        assert states is not None
        return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def make_critic(kind: CriticKind, policy: Policy, scorer: Scorer | None, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """Makes the critic of a policy. Raises ConfigError if the reward model cannot be used as one."""
    if kind == "reward":
        return _from_reward_model(policy, scorer, tokenizer).to(policy.device)
    embeddings = policy.language_model.get_output_embeddings()
    head = nn.Linear(embeddings.weight.shape[1], 1)
    nn.init.zeros_(head.weight)  # Ziegler et al. 2019: values start at exactly 0
    nn.init.zeros_(head.bias)
    if kind == "shared":
        return Critic(head).to(policy.device)
    trunk = Trunk(copy.deepcopy(policy.model))
    own_embeddings = trunk.language_model.get_output_embeddings()
    if own_embeddings.weight is not trunk.language_model.get_input_embeddings().weight:
        own_embeddings.requires_grad_(False)  # a critic generates no text
    return Critic(head, trunk).to(policy.device)


def _from_reward_model(policy: Policy, scorer: Scorer | None, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """A copy of the reward model whose value of every token is the reward that it gives to a text ending there."""
    if not isinstance(scorer, RewardModel):
        raise ConfigError("critic=reward needs a reward model, and the reward is a function: use critic=separate.")
    if not tokenizer.get_vocab().items() <= scorer.tokenizer.get_vocab().items():
        raise ConfigError(
            "critic=reward needs a reward model with the policy's tokenizer, and this one's differs:"
            " use critic=separate."
        )
    trunk = Trunk(copy.deepcopy(scorer.model).requires_grad_(True))
    score = getattr(trunk.language_model, "score", None)
    if policy.is_seq2seq or not isinstance(score, nn.Linear) or not is_causal_classifier(trunk, score):
        raise ConfigError(
            "critic=reward needs a causal decoder as policy and as reward model, so that it scores an unfinished"
            f" response as a finished one; '{trunk.language_model.config.model_type}' is none: use critic=separate."
        )
    known, needed = (
        getattr(model.config, "max_position_embeddings", None)
        for model in (trunk.language_model, policy.language_model)
    )
    if known is not None and (needed is None or known < needed):
        raise ConfigError(
            "critic=reward needs a reward model with at least the policy's context length, and this one's is"
            f" {known} tokens: use critic=separate."
        )
    head = nn.Linear(score.in_features, 1)
    std = scorer.std.to(score.weight.device)
    bias = torch.zeros_like(std) if score.bias is None else score.bias
    with torch.no_grad():  # the mean of the members' normalised scores is linear in the states, too
        head.weight.copy_((score.weight / std.unsqueeze(1)).mean(0, keepdim=True))
        head.bias.copy_(((bias - scorer.mean.to(std.device)) / std).mean())
    score.requires_grad_(False)
    cast_weights(trunk, policy.dtype)
    return Critic(head, trunk)

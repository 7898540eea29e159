"""The critic: how much reward a response will still earn, told from the state before each of its tokens.

Three kinds, all a linear head on hidden states: `shared` reads the policy's own trunk (TRL ≤ 0.11) and costs nothing;
`separate` has a trunk of its own that starts as the policy's; `reward` starts as the reward model, which already knows
what good answers are (Stiennon et al. 2020; Huang et al. 2024).
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deep_rlhf.errors import UserError
from deep_rlhf.models.policy import Policy
from deep_rlhf.models.reward import RewardModel
from deep_rlhf.models.trunk import Trunk
from deep_rlhf.runtime.precision import cast_weights
from deep_rlhf.types import Completions, CriticKind, Scorer


class Critic(nn.Module):
    """A value head on the policy's trunk, or on one of its own."""

    def __init__(self, head: nn.Linear, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.value_head = head
        self.own_trunk = trunk

    def forward(self, part: Completions, states: Tensor | None) -> Tensor:
        """Values [n, R] of the states before each response token; `states` [n, R, H] are the policy's.

        A critic with a trunk of its own needs none.
        """
        if self.own_trunk is not None:
            states = self.own_trunk.states(part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
        assert states is not None
        return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def make_critic(kind: CriticKind, policy: Policy, scorer: Scorer | None, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """The critic of a policy. Raises UserError if the reward model cannot be one."""
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
        own_embeddings.requires_grad_(False)  # a critic writes nothing
    return Critic(head, trunk).to(policy.device)


def _from_reward_model(policy: Policy, scorer: Scorer | None, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """A copy of the reward model that says of every token what the reward model says of the last one."""
    if not isinstance(scorer, RewardModel):
        raise UserError("critic=reward needs a reward model, but the reward is a function: use critic=separate.")
    if not tokenizer.get_vocab().items() <= scorer.tokenizer.get_vocab().items():
        raise UserError(
            "critic=reward needs a reward model with the policy's tokenizer, and this one has another:"
            " use critic=separate."
        )
    trunk = Trunk(copy.deepcopy(scorer.model).requires_grad_(True))
    score = getattr(trunk.language_model, "score", None)
    if policy.is_seq2seq or not isinstance(score, nn.Linear) or not _reads_from_left_to_right(trunk, score):
        raise UserError(
            "critic=reward needs a decoder as policy and as reward model, which judges an unfinished answer as it"
            f" does a whole one, and '{trunk.language_model.config.model_type}' does not: use critic=separate."
        )
    known, needed = (
        getattr(model.config, "max_position_embeddings", None)
        for model in (trunk.language_model, policy.language_model)
    )
    if known is not None and (needed is None or known < needed):
        raise UserError(
            f"critic=reward needs a reward model that reads as far as the policy, and this one ends at {known} tokens:"
            " use critic=separate."
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


@torch.no_grad()
def _reads_from_left_to_right(trunk: Trunk, score: nn.Linear) -> bool:
    """Whether the classifier's output is its head on the last state, and no state depends on what follows it."""
    if trunk.is_seq2seq:
        return False
    ids, other_end = torch.tensor([[3, 4], [3, 5]], device=trunk.device).split(1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    states, others = trunk.run_trunk(ids, mask, use_cache=False), trunk.run_trunk(other_end, mask, use_cache=False)
    own = trunk.language_model(input_ids=ids, attention_mask=mask.long()).logits
    tolerance = 1e-4 if trunk.dtype == torch.float32 else 5e-2
    pairs = ((states[:, 0], others[:, 0]), (score(states[:, 1]), own))
    return all(torch.allclose(found, expected, atol=tolerance) for found, expected in pairs)

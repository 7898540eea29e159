"""Rewards per token, advantages, returns, and baselines of groups of responses."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = −β·KL_t, plus the score on the last real token (Ziegler et al. 2019, eq. 2).

    scores [N], kl [N, R] in nats, mask [N, R] bool, True for real tokens -> [N, R], zero outside the mask. A response
    without tokens gets no score.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1, keepdim=True)
    return rewards + torch.where(positions == last, scores.unsqueeze(1), torch.zeros_like(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1} (Schulman 2016, eq. 16).

    rewards, values [N, R], mask [N, R] bool, True for real tokens; values[:, t] belongs to the state before token t,
    and the value after the last token is 0. Returns (advantages, returns = advantages + values) [N, R], zero outside
    the mask. Masked positions are skipped, also between real tokens.
    """
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = torch.where(mask, values, torch.zeros_like(values))
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, next_advantage, torch.zeros_like(delta))
    return advantages, advantages + values


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """The mean of the other samples in each sample's group (RLOO; Kool et al. 2019).

    rewards [N], group [N] ids -> baseline [N]; 0 in a group of one.
    """
    same = (group.unsqueeze(0) == group.unsqueeze(1)).to(rewards.dtype)
    others = same - torch.eye(len(rewards), dtype=rewards.dtype, device=rewards.device)
    return others @ rewards / others.sum(1).clamp(min=1)


def group_mean_std(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each sample's group, itself included (GRPO; Shao et al. 2024, §4.1).

    rewards [N], group [N] ids -> (mean [N], std [N]); std is 0 in a group of one.
    """
    same = (group.unsqueeze(0) == group.unsqueeze(1)).to(rewards.dtype)
    count = same.sum(1)
    mean = same @ rewards / count
    squared = (rewards - mean) ** 2
    return mean, (same @ squared / (count - 1).clamp(min=1)).sqrt()

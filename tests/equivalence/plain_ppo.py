"""PPO as slowly and plainly as it can be written: one row at a time, token by token, no padding, no batches."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deep_rlhf import PPOConfig

Row = tuple[list[int], list[int]]  # the ids of a prompt and of its response


@dataclass
class Models:
    """A policy, what its critic reads, and the value head."""

    policy: Any
    critic: Any
    head: nn.Linear

    def parameters(self) -> list[nn.Parameter]:
        modules = [self.policy, self.head] + ([] if self.critic is self.policy else [self.critic])
        return [parameter for module in modules for parameter in module.parameters()]


def forward(models: Models, row: Row, temperature: float) -> tuple[Tensor, Tensor]:
    """log-probabilities at the temperature, and values, [R] each."""
    prompt, response = row
    before = slice(len(prompt) - 1, -1)
    ids = torch.tensor([prompt + response])
    log_distribution = (models.policy(input_ids=ids).logits[0, before] / temperature).log_softmax(-1)
    states = models.critic(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, before]
    return torch.stack([log_distribution[t, token] for t, token in enumerate(response)]), models.head(states).squeeze(
        -1
    )


def whitened(rows: list[list[float]], *, shift_mean: bool) -> list[list[float]]:
    everything = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    mean, spread = everything.mean().item(), math.sqrt(everything.var().item() + 1e-8)
    return [[(value - mean) / spread + (0.0 if shift_mean else mean) for value in row] for row in rows]


def experience(
    rows: list[Row], scores: list[float], models: Models, reference: Models, config: PPOConfig, *, eos: int
) -> list[Any]:
    """Per row (logprobs, values, advantages, returns), by loops over floats."""
    seen, rewards = [], []
    for row, score in zip(rows, scores, strict=True):
        with torch.no_grad():
            logprobs, values = forward(models, row, config.temperature)
            ref_logprobs, _ = forward(reference, row, config.temperature)
        gaps = (logprobs - ref_logprobs).tolist()
        costs = {"kl": gaps, "k3": [math.exp(-gap) - 1 + gap for gap in gaps]}[config.kl_penalty]
        of_tokens = [-config.init_kl_coef * cost for cost in costs]
        unfinished = row[1][-1] != eos
        of_tokens[-1] += -config.missing_eos_penalty if config.missing_eos_penalty and unfinished else score
        seen.append((logprobs, values))
        rewards.append(of_tokens)
    if config.whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    advantages, returns = [], []
    for (_, values), of_tokens in zip(seen, rewards, strict=True):
        row_advantages: list[float] = []
        following, next_value = 0.0, 0.0
        for value, step_reward in reversed(list(zip(values.tolist(), of_tokens, strict=True))):
            delta = step_reward + config.gamma * next_value - value
            following = delta + config.gamma * config.lam * following
            next_value = value
            row_advantages.insert(0, following)
        advantages.append(row_advantages)
        returns.append(torch.tensor(row_advantages) + values)
    advantages = whitened(advantages, shift_mean=True)
    return [(*of_row, a, r) for of_row, a, r in zip(seen, advantages, returns, strict=True)]


def backward(models: Models, rows: list[Row], of_rows: list[Any], config: PPOConfig) -> dict[str, float]:
    """Gradients of the loss of the whole batch; returns the means over tokens of what PPO reports."""
    tokens = sum(len(response) for _, response in rows)
    names = ("policy_loss", "value_loss", "policy_clip_fraction", "value_clip_fraction")
    sums, total = dict.fromkeys(names, 0.0), torch.zeros(())
    for row, (old_logprobs, old_values, advantages, returns) in zip(rows, of_rows, strict=True):
        logprobs, values = forward(models, row, config.temperature)
        for t, gain in enumerate(advantages):
            ratio, change = (logprobs[t] - old_logprobs[t]).exp(), values[t] - old_values[t]
            clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
            near = old_values[t] + change.clamp(-config.cliprange_value, config.cliprange_value)
            value_losses = 0.5 * (values[t] - returns[t]) ** 2, 0.5 * (near - returns[t]) ** 2
            losses = max(-gain * ratio, -gain * clipped), max(*value_losses)
            total = total + (losses[0] + config.vf_coef * losses[1]) / tokens
            clips = -gain * clipped > -gain * ratio, value_losses[1] > value_losses[0]
            for name, value in zip(names, (*losses, *clips), strict=True):
                sums[name] += value.item()
    total.backward()
    return {name: value / tokens for name, value in sums.items()} | {"loss": total.item()}

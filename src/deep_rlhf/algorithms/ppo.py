"""Proximal policy optimisation of a language model against a reward on text (Schulman 2017; Ziegler 2019).

One update: sample a response to each prompt, score the text, turn the score and the per-token KL penalty into
advantages (GAE), then a few epochs of clipped policy and value losses. The maths is in `ops`, the sampling in
`rollout`; what is here is the algorithm. Where it departs from the sources:
- a sample is drawn by inverting the distribution at a given uniform, so it depends on neither padding nor neighbours;
- every process holds the whole experience (it is small) and computes its share of each minibatch; losses are divided by
  the global number of real tokens, so the number of processes and the cut into forward passes change nothing;
- Adam's eps is 1e-5 (Huang et al. 2024), added after the bias correction as PyTorch does.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from deep_rlhf.algorithms.ppo_config import PPOConfig
from deep_rlhf.models.adapters import add_lora
from deep_rlhf.models.load import load_language_model, load_tokenizer
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.models.reward import FunctionScorer, RewardModel, load_scorer
from deep_rlhf.ops.advantages import gae, token_rewards
from deep_rlhf.ops.kl import adapted_kl_coef, kl_estimate
from deep_rlhf.ops.losses import explained_variance, policy_loss, value_loss
from deep_rlhf.ops.masked import masked_mean, masked_sum, whiten
from deep_rlhf.rollout.collect import collect, complete, prompt_batch, token_batches
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.generate import eos_token_ids, generate_text, sampling_uniforms
from deep_rlhf.rollout.records import concatenate, moved, select
from deep_rlhf.runtime.runtime import Runtime
from deep_rlhf.runtime.trackers import usable_trackers
from deep_rlhf.types import Experience, Rollout, RowReport, Scorer, UserError


class PPOTrainer:
    """Trains a policy so that its responses to `prompts` score high while it stays near where it started."""

    def __init__(
        self,
        config: PPOConfig,
        *,
        prompts: Sequence[str],
        reward: Scorer | str | Callable[[list[str], list[str]], Sequence[float]],
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> None:
        """Model and tokenizer are objects or names (default: `config.model_name`); the model is trained in place.

        `reward` is a Scorer, a function of (prompts, responses) that returns one number each, or what the flag
        `--reward_model` takes. Raises UserError if something cannot be opened or no prompt can be used.
        """
        set_seed(config.seed)
        self.config = config
        self.runtime = Runtime(usable_trackers([config.log_with or "none"], run_name=config.exp_name))
        if config.batch_size < self.runtime.processes:
            raise UserError(
                f"batch_size={config.batch_size} gives some of the {self.runtime.processes} processes nothing to do:"
                " raise it."
            )
        model = config.model_name if model is None else model
        if tokenizer is None:
            tokenizer = model if isinstance(model, str) else model.name_or_path or None
        if tokenizer is None:
            raise UserError("Give PPOTrainer the model's tokenizer: this model object does not say where it came from.")
        self.tokenizer = _tokenizer(tokenizer, config)
        self._policy = _policy(model, config).to(self.runtime.device)
        self._reference = Reference(self._policy)
        self.scorer = _scorer(reward, self.runtime.device, config.trust_remote_code)
        self.sampler = Engine(
            self._policy,
            eos_ids=eos_token_ids(self._policy.language_model, self.tokenizer),
            temperature=config.temperature,
        )
        longest = _longest_prompt(self._policy.language_model, config)
        self.prompts, self.prompt_report = _usable_prompts(prompts, self.tokenizer, longest)
        steps = len(self.prompts) if config.steps is None else config.steps
        self.updates = max(1, steps // config.batch_size if config.steps is None else -(-steps // config.batch_size))
        self.optimizer = torch.optim.AdamW(
            self._policy.trainable_parameters(), lr=config.learning_rate, eps=1e-5, weight_decay=0.0
        )
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimizer, 0, self.updates)
        self.kl_coef = config.init_kl_coef
        self.history: list[dict[str, float]] = []
        self.last_rollout: Rollout | None = None

    @property
    def policy(self) -> PreTrainedModel:
        """The tuned model as plain transformers knows it (adapters merged into a copy)."""
        return self._policy.plain_model()

    def train(
        self, on_update: Callable[[dict[str, float]], None] | None = None, *, updates: int | None = None
    ) -> list[dict[str, float]]:
        """Runs the next `updates` updates (default: all that are left) and returns `history`, a dict of metrics each.

        `on_update` may add to each dict. Between two calls `scorer` may be replaced, by one refitted to new answers.
        """
        done = len(self.history)
        end = self.updates if updates is None else min(self.updates, done + updates)
        if done == 0:
            self.runtime.start_trackers("deep-rlhf", dataclasses.asdict(self.config))
        bar = tqdm(range(done, end), desc="PPO", unit="update", disable=not self.runtime.is_main)
        for update in bar:
            metrics = self.step(update)
            bar.set_postfix(score=f"{metrics['score_mean']:.3f}", kl=f"{metrics['kl']:.2f}")
            if on_update is not None:
                on_update(metrics)
            self.history.append(metrics)
            self.runtime.log(metrics, update + 1)
        if end == self.updates:
            self.runtime.finish()
        return self.history

    def step(self, update: int) -> dict[str, float]:
        """One update: collect, experience, epochs of minibatches. Returns its metrics."""
        start = time.perf_counter()
        rollout = self.last_rollout = self._collect(update)
        sampled = time.perf_counter()
        experience = self._experience(rollout)
        metrics = {"step": float(update + 1), "kl_coef": self.kl_coef, **_rollout_metrics(experience)}
        metrics |= {"learning_rate": self.scheduler.get_last_lr()[0], **self._update(experience, update)}
        self.scheduler.step()
        if self.config.adap_kl_ctrl:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                metrics["kl"],
                target=self.config.target,
                horizon=self.config.horizon,
                samples=self.config.batch_size,
            )
        tokens = float(experience.response_mask.sum())
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - start)
        metrics["sampling_share_of_time"] = (sampled - start) / (time.perf_counter() - start)
        metrics["memory_gb"] = self.runtime.peak_memory_gb()
        return metrics

    def generate(self, prompts: Sequence[str], *, seed: int = 0) -> list[str]:
        """One response of the policy as it is now to each prompt."""
        return generate_text(
            self._policy,
            self.tokenizer,
            list(prompts),
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=seed,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the policy and tokenizer as a plain transformers folder and opens it again to be sure it is whole."""
        if not self.runtime.is_main:
            return
        model = self.policy
        model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        reopened = load_language_model(
            str(folder), seq2seq=self._policy.is_seq2seq, trust_remote_code=self.config.trust_remote_code
        ).state_dict()
        for name, weight in model.state_dict().items():
            if not torch.equal(reopened[name], weight.cpu()):
                raise UserError(
                    f"The policy saved in '{folder}' differs from the trained one in '{name}': save it again."
                )

    def _collect(self, update: int) -> Rollout:
        """The batch of this update, sampled and scored in shares, whole on every process."""
        config = self.config
        uniforms = sampling_uniforms(config.seed, update, config.batch_size, config.max_new_tokens)
        texts = self.runtime.share(self._batch_of_prompts(update))
        left = not self._policy.is_seq2seq
        prompts = prompt_batch(texts, self.tokenizer, self.runtime.device, left=left)
        uniforms = self.runtime.share(uniforms)
        completions = complete(prompts, self.sampler, self.tokenizer, uniforms, continues=left)
        part = collect(completions, self._policy, self._reference, self.scorer, config.temperature)
        parts = self.runtime.gather(moved(part, torch.device("cpu")))  # each process may have a device of its own
        return moved(concatenate(parts, left=left), self.runtime.device)

    def _batch_of_prompts(self, update: int) -> list[str]:
        """The prompts of an update: each pass over the data is a new permutation, and batches run across passes."""
        size, count = self.config.batch_size, len(self.prompts)
        batch = []
        for position in range(update * size, (update + 1) * size):
            epoch, offset = divmod(position, count)
            if offset == 0 or position == update * size:
                generator = torch.Generator().manual_seed(self.config.seed * 7_919 + epoch)
                order = torch.randperm(count, generator=generator).tolist()
            batch.append(self.prompts[order[offset]])
        return batch

    def _experience(self, rollout: Rollout) -> Experience:
        """Rewards, advantages and returns of a rollout."""
        config, mask = self.config, rollout.response_mask
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_penalty)
        rewards = token_rewards(rollout.scores, kl, mask, self.kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        fields = {name.name: getattr(rollout, name.name) for name in dataclasses.fields(rollout)}
        return Experience(**fields, rewards=rewards, advantages=whiten(advantages, mask), returns=returns)

    def _update(self, experience: Experience, update: int) -> dict[str, float]:
        """Epochs of minibatches over one experience; returns the means over all optimiser steps."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 104_729 + update)
        size = config.mini_batch_size or config.batch_size
        steps: list[Tensor] = []
        for _ in range(config.ppo_epochs):
            order = torch.randperm(config.batch_size, generator=generator).to(self.runtime.device)
            for minibatch in order.split(size):
                steps.append(self._optimizer_step(experience, minibatch))
        names = ("policy_loss", "value_loss", "policy_clip_fraction", "value_clip_fraction", "approx_kl", "grad_norm")
        return dict(zip(names, torch.stack(steps).mean(0).tolist(), strict=True))

    def _optimizer_step(self, experience: Experience, minibatch: Tensor) -> Tensor:
        """One step on the samples `minibatch`, in as many forward passes as fit; returns its six means."""
        tokens = experience.response_mask[minibatch].sum()
        sums = torch.zeros(5, device=self.runtime.device)
        self.optimizer.zero_grad()
        own_share = self.runtime.share(minibatch)
        for rows in token_batches(experience, own_share) if len(own_share) else []:
            loss, statistics = self._loss(select(experience, rows))
            (loss / tokens).backward()
            sums += statistics
        parameters = self._policy.trainable_parameters()
        self.runtime.sum_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not torch.isfinite(grad_norm):
            raise UserError(
                "The gradient is no longer finite, so PPO stops before it ruins the policy: lower the learning rate."
            )
        self.optimizer.step()
        return torch.cat([self.runtime.sum(sums) / tokens, grad_norm.reshape(1)])

    def _loss(self, part: Experience) -> tuple[Tensor, Tensor]:
        """The loss summed over the real tokens of `part`, and what is reported about it, summed likewise."""
        config, mask = self.config, part.response_mask
        states = self._policy.states(part.prompt_ids, part.prompt_mask, part.response_ids, mask)
        logprobs = self._policy.logprobs(states, part.response_ids, mask, config.temperature)
        policy_losses, policy_clipped = policy_loss(
            logprobs, part.logprobs, part.advantages, cliprange=config.cliprange
        )
        value_losses, value_clipped = value_loss(
            self._policy.values(states), part.values, part.returns, cliprange_value=config.cliprange_value
        )
        approx_kl = 0.5 * (logprobs.detach() - part.logprobs) ** 2
        columns = (policy_losses, value_losses, policy_clipped.float(), value_clipped.float(), approx_kl)
        sums = torch.stack([masked_sum(column, mask) for column in columns])
        return sums[0] + config.vf_coef * sums[1], sums.detach()


def _rollout_metrics(experience: Experience) -> dict[str, float]:
    mask = experience.response_mask
    kl = torch.where(mask, experience.logprobs - experience.ref_logprobs, 0.0).sum(1)
    gap = (experience.logprobs - experience.sampler_logprobs).abs()
    return {
        "score_mean": float(experience.scores.mean()),
        "score_std": float(experience.scores.std(correction=0)),
        "score_member_std": float(experience.score_std.mean()),
        "kl": float(kl.mean()),
        "entropy": float(masked_mean(experience.entropy, mask)),
        "value_mean": float(masked_mean(experience.values, mask)),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
        "response_tokens": float(mask.sum(1).float().mean()),
        "missing_eos": float(1.0 - experience.finished.float().mean()),
        "sampler_logprob_gap": float(masked_mean(gap, mask)),
    }


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str, config: PPOConfig) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, str):
        return load_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code)
    return tokenizer


def _policy(model: PreTrainedModel | str, config: PPOConfig) -> Policy:
    if isinstance(model, str):
        model = load_language_model(model, seq2seq=config.use_seq2seq, trust_remote_code=config.trust_remote_code)
    if config.use_peft:
        task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        return Policy(add_lora(model, r=config.lora_r, alpha=config.lora_alpha, task_type=task_type))
    return Policy(model)


def _scorer(reward: Any, device: torch.device, trust_remote_code: bool) -> Scorer:
    if isinstance(reward, str):
        reward = load_scorer(reward, trust_remote_code=trust_remote_code)
    if isinstance(reward, RewardModel):
        reward.model.to(device)
    return reward if hasattr(reward, "score") else FunctionScorer(reward, getattr(reward, "__name__", "reward"))


def _longest_prompt(model: PreTrainedModel, config: PPOConfig) -> int:
    """The most tokens of a prompt: as told, or what the response leaves of the positions that the model knows."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return config.max_prompt_length
    if config.max_new_tokens >= positions:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in the {positions} positions of the"
            " model: lower it."
        )
    return min(config.max_prompt_length, positions - config.max_new_tokens)


def _usable_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[str], RowReport]:
    """Prompts with 1 to `longest` tokens, and what became of the others."""
    lengths = [len(row) for row in tokenizer(list(prompts)).input_ids] if len(prompts) else []
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if 0 < length <= longest]
    dropped = {"too long": sum(length > longest for length in lengths), "empty": lengths.count(0)}
    if not kept:
        raise UserError(
            f"None of the {len(prompts)} prompts can be used ({dropped['too long']} have more than {longest} tokens, "
            f"{dropped['empty']} are empty): raise max_prompt_length or give other prompts."
        )
    return kept, RowReport(read=len(prompts), kept=len(kept), dropped={k: v for k, v in dropped.items() if v})

"""TRL's PPOTrainer: a script loops over `generate` and `step`; a step is one update of `algorithms.ppo`."""

import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from deep_rlhf.algorithms.online.bad_batches import rollout_problem
from deep_rlhf.algorithms.online.build import open_runtime
from deep_rlhf.algorithms.online.score_shaping import ScoreShaping
from deep_rlhf.algorithms.ppo import PPO
from deep_rlhf.compat.trl import batches
from deep_rlhf.compat.trl.config import PPOConfig
from deep_rlhf.compat.trl.core import set_seed
from deep_rlhf.compat.trl.models import PreTrainedModelWrapper, create_reference_model, push_saved
from deep_rlhf.compat.trl.stats import step_stats
from deep_rlhf.errors import NotFiniteError, RewardError
from deep_rlhf.models.critic import Critic
from deep_rlhf.models.policy import Policy, Reference
from deep_rlhf.ops.kl import adapted_kl_coef
from deep_rlhf.rollout.collect import collect
from deep_rlhf.rollout.generate import eos_token_ids
from deep_rlhf.rollout.records import concatenate, to_device
from deep_rlhf.types import Completions, Rollout

logger = logging.getLogger(__name__)

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer"]


class AdaptiveKLController:
    """A KL coefficient adapted towards a target KL (Ziegler et al. 2019, §2.2)."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """`current` is the KL in nats per response of the last `n_steps` responses."""
        self.value = adapted_kl_coef(
            self.value, float(current), target=self.target, horizon=self.horizon, samples=n_steps
        )


class FixedKLController:
    """A constant KL coefficient."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Does nothing."""


class PPOTrainer:
    """Trains `model` in place, one `step` per batch of queries, responses and scores."""

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Any = None,
    ) -> None:
        """Later changes of `config` have no effect.

        Without `ref_model` the reference is a copy of the model as it is now, or its base with the adapters off.
        `optimizer` and `lr_scheduler` replace this project's AdamW with a constant learning rate;
        `training_data_collator` has no effect. Raises ValueError for an argument of another type.
        """
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config must be a PPOConfig, got {type(config)}")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer must be a PreTrainedTokenizerBase, got {type(tokenizer)}")
        if not isinstance(model, PreTrainedModelWrapper):
            raise ValueError(f"model must be an AutoModelFor…WithValueHead, got {type(model)}")
        if ref_model is not None and not isinstance(ref_model, PreTrainedModelWrapper):
            raise ValueError(f"ref_model must be an AutoModelFor…WithValueHead or None, got {type(ref_model)}")
        if lr_scheduler is not None and optimizer is None:
            raise ValueError("lr_scheduler is that of another optimizer: give the trainer this optimizer, too")
        native = config.native(1)
        set_seed(config.seed)
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self._runtime = open_runtime(native)
        self._native = config.native(self._runtime.processes)
        self.accelerator = self._runtime.accelerator
        self.current_device = self._runtime.device
        self.is_distributed = self._runtime.processes > 1
        self.ref_model = ref_model
        if ref_model is None and not model.is_peft_model:
            self.ref_model = create_reference_model(model, num_shared_layers)
        self._policy, self._reference = self._open_models()
        self.is_encoder_decoder, self.is_peft_model = self._policy.is_seq2seq, model.is_peft_model
        self._eos_ids = eos_token_ids(self._policy.language_model, tokenizer)
        self._learner = self._make_learner(optimizer, lr_scheduler)
        self.optimizer = self._learner.optimisation.adam
        self.lr_scheduler = lr_scheduler
        self.kl_ctl: AdaptiveKLController | FixedKLController = FixedKLController(config.init_kl_coef)
        if config.adap_kl_ctrl:
            self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.current_step = 0
        self._shaping = ScoreShaping(self._native)
        self._highest_reward = -float("inf")
        self._fill_in_config()
        public = {name: value for name, value in config.to_dict().items() if not name.endswith("/token")}
        self._runtime.start_trackers(config.tracker_project_name, public, self._native.tracker_kwargs)
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None = None) -> DataLoader:
        """A DataLoader of shuffled full batches of `config.batch_size` rows, different ones for each process.

        With `config.remove_unused_columns` a datasets.Dataset keeps the columns that the model's forward takes, and
        label, query and response.
        """
        if isinstance(dataset, datasets.Dataset) and self.config.remove_unused_columns:
            used = {*inspect.signature(self.model.forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in used])
        size = self.config.batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=data_collator, shuffle=True, drop_last=True)
        return self.accelerator.prepare(loader)

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Generates responses by transformers' `generate` with `generation_kwargs`.

        For a list of queries [length] it returns a list of token ids without padding, EOS included, generated in
        batches of `batch_size`; for one query the result of `generate`, [1, length]. `return_prompt` puts the query
        before the response (not for an encoder-decoder, whose response begins with its start token).
        `length_sampler` draws max_new_tokens for each batch. With `generate_ref_response` it returns a pair: the
        model's responses, and the reference's.
        """

        def respond(model: Any) -> Any:
            options = (length_sampler, batch_size, return_prompt, generation_kwargs)
            if isinstance(query_tensor, list):
                return self._generate_batched(model, query_tensor, *options)
            response = self._generate(model, [query_tensor], length_sampler, generation_kwargs)
            return response if return_prompt or self.is_encoder_decoder else response[:, len(query_tensor) :]

        responses = respond(self.model)
        if not generate_ref_response:
            return responses
        if self.ref_model is not None:
            return responses, respond(self.ref_model)
        with self.model.pretrained_model.disable_adapter():
            return responses, respond(self.model)

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Makes one PPO update from `config.batch_size` queries [length], responses [length] and scores [1].

        `response_masks` are 1 for a response's first tokens and 0 after them. Returns statistics under TRL's keys.
        Raises ValueError for input of another form, and RewardError for a number that is not finite, at which the
        update ends.
        """
        times = [time.perf_counter()]
        responses, member_scores = batches.checked(self.config.batch_size, queries, responses, scores, response_masks)
        completions = self._completions(queries, responses)
        moments = self._shaping.moments
        shaped_scores = self._shaping.shaped(member_scores, completions.finished, self._runtime)
        times.append(time.perf_counter())
        rollout = self._rollout(completions, member_scores, shaped_scores)
        times.append(time.perf_counter())
        kl_coef = self.kl_ctl.value
        experience = self._learner.experience(rollout, kl_coef)
        times.append(time.perf_counter())
        try:
            if problem := rollout_problem(rollout):
                raise NotFiniteError(problem)
            self._push_if_best(float(rollout.scores.mean()))
            learned = self._learner.learn(rollout, kl_coef=kl_coef, update=self.current_step)
        except NotFiniteError as error:
            self._shaping.moments = moments
            raise RewardError(
                f"This batch cannot be learned from: {error}. Correct the reward, or leave the batch out."
            ) from error
        times.append(time.perf_counter())
        stats = step_stats(experience, learned, kl_coef)
        if stats["objective/kl"] < -1.0:
            logger.warning(
                "The KL is %.2f nats per response, and a KL is never negative: the responses were not drawn from the"
                " policy as it is. Generate with do_sample=True, top_k=0, top_p=1.0 and temperature=1.0.",
                stats["objective/kl"],
            )
        self.kl_ctl.update(stats["objective/kl"], self._native.batch_size)
        self.current_step += 1
        if self.config.optimize_device_cache and self.current_device.type == "cuda":
            torch.cuda.empty_cache()
        times.append(time.perf_counter())
        names = ("compute_rewards", "forward_pass", "compute_advantages", "optimize_step", "calc_stats")
        spans = {name: times[i + 1] - times[i] for i, name in enumerate(names)} | {"total": times[-1] - times[0]}
        return stats | {f"time/ppo/{name}": seconds for name, seconds in spans.items()}

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: list[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Sends statistics, and with wandb a table of the batch, to the tracker of `config.log_with`."""
        columns = list(columns_to_log)
        missing = [name for name in columns if name not in batch]
        if self.config.log_with == "wandb" and missing:
            raise ValueError(f"Columns to log {missing} are not present in the batch {list(batch)}.")
        own = torch.stack([torch.as_tensor(reward).float().reshape(()).cpu() for reward in rewards])
        own_rows = [list(row) for row in zip(*(_listed(batch[name]) for name in columns if name in batch), strict=True)]
        everything = torch.cat(self._runtime.gather(own))
        rows = [row for part in self._runtime.gather(own_rows) for row in part]
        if not self._runtime.is_main or not self.accelerator.trackers:
            return
        logs = dict(stats)
        if self.config.log_with == "wandb":
            import wandb

            table = [[*row, reward] for row, reward in zip(rows, everything.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns, "reward"], data=table)
        logs["env/reward_mean"] = everything.mean().item()
        logs["env/reward_std"] = everything.std(correction=min(1, len(everything) - 1)).item()
        logs["env/reward_dist"] = everything.numpy()
        # a script may write to wandb itself, which counts its own steps
        self.accelerator.log(logs, step=None if self.config.log_with == "wandb" else self.current_step)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the model with its value head, and the tokenizer."""
        if self._runtime.is_main:
            self.model.save_pretrained(save_directory)
            self.tokenizer.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Uploads the folder of `save_pretrained`; `options` as in `runtime.hub.push_folder`."""
        if self._runtime.is_main:
            push_saved(self.save_pretrained, repo_id=repo_id, **options)

    def _open_models(self) -> tuple[Policy, Reference]:
        """The policy and its reference, on the trainer's device."""
        model, ref_model = self.model, self.ref_model
        if model.is_peft_model and model.pretrained_model.active_peft_config.is_prompt_learning:
            raise ValueError("Prompt and prefix tuning are not supported: use adapters in the layers, such as LoRA")
        if ref_model is not None:
            trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
            if any(id(parameter) in trained for parameter in ref_model.parameters()):
                raise ValueError("ref_model shares weights with the model that is trained: give a model of its own")
        for each in (model, ref_model):
            if each is not None and getattr(each.pretrained_model, "hf_device_map", None) is None:
                each.to(self.current_device)
        policy = Policy(model.pretrained_model)
        model.v_head.to(policy.device)
        with torch.no_grad():  # the script may have drawn other adapters or another head in each process
            for parameter in model.parameters() if self.is_distributed else ():
                if parameter.requires_grad:
                    parameter.copy_(self._runtime.sum(parameter * self._runtime.is_main))
        asked = any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())
        if self.config.gradient_checkpointing or asked:  # the script may have switched it on itself
            policy.checkpoint_activations()
        if ref_model is None:
            return policy, Reference(policy)
        frozen = Policy(ref_model.pretrained_model)
        return policy, Reference(policy, frozen=Policy(frozen.plain_model()) if frozen.is_adapted else frozen)

    def _make_learner(
        self, optimizer: torch.optim.Optimizer | None, lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    ) -> PPO:
        return PPO(
            self._native,
            self._policy,
            self._runtime,
            updates=max(1, self.config.total_ppo_epochs),
            scorer=None,
            tokenizer=self.tokenizer,
            critic=Critic(self.model.v_head.summary),
            optimizer=optimizer,
            schedule=lr_scheduler,
        )

    def _fill_in_config(self) -> None:
        config, processes = self.config, self._runtime.processes
        config.world_size = processes
        config.is_encoder_decoder, config.is_peft_model = self.is_encoder_decoder, self.is_peft_model
        config.global_backward_batch_size = self._native.optimizer_batch_size
        config.global_batch_size = self._native.batch_size

    def _generate_batched(
        self,
        model: PreTrainedModelWrapper,
        queries: list[Tensor],
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        options: dict[str, Any],
    ) -> list[Tensor]:
        outputs = []
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            generated = self._generate(model, batch, length_sampler, options)
            before = 1 if self.is_encoder_decoder else max(len(query) for query in batch)
            for query, row in zip(batch, generated, strict=True):
                response = self._until_eos(row[before:])
                if self.is_encoder_decoder:
                    response = torch.cat([row[:1], response])
                elif return_prompt:
                    response = torch.cat([query.to(response.device), response])
                outputs.append(response)
        return outputs

    def _generate(
        self,
        model: PreTrainedModelWrapper,
        queries: list[Tensor],
        length_sampler: Callable[[], int] | None,
        options: dict[str, Any],
    ) -> Tensor:
        """The model's `generate` on one batch, padded on the left (on the right for an encoder-decoder)."""
        for query in queries:
            if not isinstance(query, Tensor) or query.dim() != 1:
                shape = tuple(query.shape) if isinstance(query, Tensor) else type(query)
                raise ValueError(
                    f"query_tensor must be a tensor of token ids [length], or a list of them - got {shape}"
                )
        model.eval()  # activation checkpointing leaves train mode behind, in which there is no cache
        if length_sampler is not None:
            options = {**options, "max_new_tokens": length_sampler()}
        fill = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids, mask = batches.padded(queries, self._policy.device, left=not self.is_encoder_decoder, fill=fill)
        with torch.no_grad():
            return model.generate(input_ids=ids, attention_mask=mask.long(), **options)

    def _until_eos(self, response: Tensor) -> Tensor:
        ends = torch.isin(response, torch.tensor(self._eos_ids, device=response.device)).nonzero()
        return response[: int(ends[0]) + 1] if len(ends) else response

    def _completions(self, queries: list[Tensor], responses: list[Tensor]) -> Completions:
        """This process's queries and responses as a record, without what generation appended after EOS."""
        policy = self._policy
        if policy.is_seq2seq:  # TRL's responses of an encoder-decoder begin with the token that decoding starts with
            start = int(policy.start_ids(1))
            responses = [row[1:] if len(row) > 1 and int(row[0]) == start else row for row in responses]
        pad_id = self.tokenizer.pad_token_id
        responses = [batches.without_padding(row, self._eos_ids, pad_id) for row in responses]
        return batches.make_completions(queries, responses, policy, self.tokenizer, self._eos_ids)

    def _rollout(self, completions: Completions, scores: Tensor, shaped_scores: Tensor) -> Rollout:
        """The rollout of all processes' completions: log-probabilities, KL and values of each token added."""
        native, policy = self._native, self._policy
        self.model.eval()
        own_rollout = collect(
            completions,
            policy,
            self._reference,
            scores,
            shaped_scores,
            temperature=native.temperature,
            kl_penalty=native.kl_penalty,
            critic=self._learner.critic,
            max_rows=native.forward_batch_size,
        )
        entropy = batches.policy_entropy(completions, policy, native.temperature, native.forward_batch_size)
        own_rollout = dataclasses.replace(own_rollout, sampler_logprobs=own_rollout.logprobs, entropy=entropy)
        rollouts = self._runtime.gather(to_device(own_rollout, torch.device("cpu")))
        return to_device(concatenate(rollouts, left=not policy.is_seq2seq), self.current_device)

    def _push_if_best(self, score: float) -> None:
        options = self._native.push_to_hub_if_best_kwargs
        if not options or self.current_step % self.config.compare_steps or score <= self._highest_reward:
            return
        self._highest_reward = score
        self.push_to_hub(**options)


def _listed(column: Any) -> list[Any]:
    return [value.tolist() if isinstance(value, Tensor) else value for value in column]

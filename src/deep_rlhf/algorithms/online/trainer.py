"""The training loop of all online algorithms: sample, score, learn, measure, checkpoint.

What an algorithm does with a batch is in its `Learner`, one file each. A batch depends only on the seed, the number of
the update and the policy, so a resumed run computes exactly what an uninterrupted one would. An update ends at the
first NaN or infinity, and its batch is written to a file.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deep_rlhf.accel.cpu.allocator import kept_memory, release_freed_memory
from deep_rlhf.algorithms.online import build
from deep_rlhf.algorithms.online.bad_batches import rollout_problem, set_aside
from deep_rlhf.algorithms.online.checkpoints import OnlineCheckpoints
from deep_rlhf.algorithms.online.config import RESUME_MAY_CHANGE, OnlineConfig
from deep_rlhf.algorithms.online.identity import run_identity
from deep_rlhf.algorithms.online.learner import Learner
from deep_rlhf.algorithms.online.metrics import rollout_metrics, sample_rows
from deep_rlhf.algorithms.online.prompts import PromptBatches, count_updates, longest_prompt, usable_prompts
from deep_rlhf.algorithms.online.score_shaping import ScoreShaping
from deep_rlhf.algorithms.online.state import copied, load_tensors, trainable_tensors
from deep_rlhf.errors import CheckpointError, NotFiniteError, RewardError
from deep_rlhf.models.policy import Policy
from deep_rlhf.models.reward import member_scores
from deep_rlhf.models.saving import save_model
from deep_rlhf.ops.kl import adapted_kl_coef
from deep_rlhf.rollout.collect import collect, complete, needs_states, prompt_batch
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.generate import eos_token_ids, generate_text
from deep_rlhf.rollout.records import concatenate, to_device
from deep_rlhf.rollout.sampler import sampling_uniforms
from deep_rlhf.runtime.checkpoint import random_states, set_random_states
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.runtime.hub import push_folder
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.runtime.signals import Stopped, first_signal_deferred
from deep_rlhf.types import Rollout, Scorer

logger = logging.getLogger(__name__)


class OnlineTrainer:
    """Trains a policy to maximise a reward on its responses, with a KL penalty towards the model it starts from."""

    make_learner: ClassVar[Callable[..., Learner]]  # (config, policy, runtime, updates=, scorer=, tokenizer=)

    def __init__(
        self,
        config: OnlineConfig,
        *,
        prompts: Sequence[str],
        reward: Scorer | str | Callable[[list[str], list[str]], Sequence[float]],
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> None:
        """Model and tokenizer are objects or names (default: `config.model_name`); the model is trained in place.

        `reward` is a Scorer, a function of (prompts, responses) that returns one number each, or a value of the flag
        `--reward_model`. With `config.output_dir` checkpoints are written there; with `config.resume` training
        continues from the newest one. Raises ModelError or RewardError if something cannot be opened, DataError if no
        prompt can be used, ConfigError for contradictory settings, and CheckpointError if output_dir holds another
        run or an unfinished one.
        """
        set_seed(config.seed)
        self.config = config
        self._folder = Path(config.output_dir or f"outputs/{config.exp_name}").absolute()  # a callback may chdir
        self.runtime: Runtime = build.open_runtime(config)
        model, self.tokenizer = build.model_and_tokenizer(model, tokenizer, config)
        self._policy: Policy = build.open_policy(model, self.runtime.device, config)
        self._reference = build.open_reference(self._policy, config)
        self.scorer = build.open_scorer(reward, self.runtime.device, config)
        longest = longest_prompt(self._policy.language_model, config)
        self.prompts, self.prompt_report = usable_prompts(prompts, self.tokenizer, longest)
        self._prompt_batches = PromptBatches(
            self.prompts,
            seed=config.seed,
            batch_size=config.batch_size,
            samples_per_prompt=config.samples_per_prompt,
        )
        self.updates = count_updates(len(self.prompts), config)
        self.learner = type(self).make_learner(
            config, self._policy, self.runtime, updates=self.updates, scorer=self.scorer, tokenizer=self.tokenizer
        )
        self.sampler = Engine(
            self._policy,
            eos_ids=eos_token_ids(self._policy.language_model, self.tokenizer),
            temperature=config.temperature,
            keep_states=needs_states(self.learner.critic, config.kl_penalty),
        )
        self.kl_coef = config.init_kl_coef
        self.history: list[dict[str, float]] = []
        self.last_rollout: Rollout | None = None
        self._shaping = ScoreShaping(config)
        self._best_score = -float("inf")
        self.bad_batches = self.bad_in_a_row = 0  # batches that could not be learned from
        self._signal = 0  # that asked for a stop
        self._identity = run_identity(
            config,
            self.prompts,
            self._reference,
            self.scorer,
            updates=self.updates,
            processes=self.runtime.processes,
            without=RESUME_MAY_CHANGE,
        )
        self._checkpoints = OnlineCheckpoints(config, self.runtime, self._identity, updates=self.updates)
        if (found := self._checkpoints.find()) is not None:
            self._load(found.state)

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The `metrics` and `samples` of every update so far, as checkpoints hold them; empty without an output_dir."""
        return self._checkpoints.history.rows

    @property
    def policy(self) -> PreTrainedModel:
        """The trained model as a plain transformers model (adapters are merged into a copy)."""
        return self._policy.plain_model()

    def train(
        self, on_update: Callable[[dict[str, float]], None] | None = None, *, updates: int | None = None
    ) -> list[dict[str, float]]:
        """Makes the next `updates` updates (default: all that are left); returns `history`, one dict of metrics each.

        `on_update` may add to each dict; if it raises, the update is done and a checkpoint holds it. Between two calls
        `scorer` may be replaced, for example by one refitted to new labels. After Ctrl-C, SIGTERM or SIGHUP the running
        update is finished, a checkpoint written and Stopped raised; a second signal ends the run at once. Raises
        RewardError after `max_bad_batches` batches in a row with a number that is not finite.
        """
        done = len(self.history)
        end = self.updates if updates is None else min(self.updates, done + updates)
        self._checkpoints.start()
        if done < end:
            name = self.config.tracker_project_name or "deep-rlhf"
            self.runtime.start_trackers(name, dataclasses.asdict(self.config), self.config.tracker_kwargs)
        bar = tqdm(
            range(done, end),
            desc=self.config.exp_name,
            unit="update",
            initial=done,
            total=end,
            disable=not self.runtime.is_main,
        )
        self._signal = 0
        with first_signal_deferred(self._ask_to_stop), kept_memory():
            for update in bar:
                metrics = self.step(update)
                bar.set_postfix(score=f"{metrics['score_mean']:.3f}", kl=f"{metrics['kl']:.2f}")
                self._end_update(metrics, on_update)
                number = max(self.runtime.gather(self._signal))
                # no checkpoint between bad batches, so that the newest one is from before they began
                due = (update + 1) % self.config.save_freq == 0 and not self.bad_in_a_row
                if number or due or update + 1 == self.updates:
                    self.checkpoint()
                if number:
                    raise Stopped(number)
        if end == self.updates:
            self.runtime.finish()
        return self.history

    def _end_update(self, metrics: dict[str, float], on_update: Callable[[dict[str, float]], None] | None) -> None:
        """Adds the update to the history; whatever `on_update` raises, the update is not lost."""
        self.history.append(metrics)
        failure: Exception | None = None
        try:
            if on_update is not None:
                on_update(metrics)
        except Exception as error:
            failure = error
        samples = sample_rows(self.last_rollout, metrics["step"]) if self.last_rollout is not None else []
        self._checkpoints.add_update(metrics, samples)
        if failure is None:
            self.runtime.log(metrics, len(self.history))
            return
        if self.runtime.processes == 1 and not self.bad_in_a_row:  # the others do not know of the failure
            try:
                self.checkpoint()
            except CheckpointError as error:  # it must not hide the failure
                logger.warning("%s", error)
        raise failure

    def _ask_to_stop(self, number: int) -> None:
        self._signal = number

    def step(self, update: int) -> dict[str, float]:
        """Makes one update: sample, score, learn. Returns its metrics."""
        start = time.perf_counter()
        moments = self._shaping.moments
        rollout = self.last_rollout = self.collect_rollout(update)
        collected = time.perf_counter()
        metrics = {"step": float(update + 1), "kl_coef": self.kl_coef, **rollout_metrics(rollout)}
        try:
            if problem := rollout_problem(rollout):
                raise NotFiniteError(problem)
            self._push_if_best(metrics["score_mean"], update)
            metrics |= self.learner.learn(rollout, kl_coef=self.kl_coef, update=update)
        except NotFiniteError as error:
            self._shaping.moments = moments
            self._set_aside(rollout, update, str(error))
        else:
            self.bad_in_a_row = 0
            if self.config.adapts_kl_coef(update):
                self._adapt_kl_coef(float(torch.where(rollout.response_mask, rollout.kl, 0.0).sum(1).mean()))
        seconds = time.perf_counter() - start
        metrics["bad_batches"] = float(self.bad_batches)
        metrics["tokens_per_second"] = float(rollout.response_mask.sum()) / seconds
        metrics["sampling_share_of_time"] = (collected - start) / seconds
        metrics["memory_gb"] = self.runtime.peak_memory_gb()
        return metrics

    def collect_rollout(self, update: int) -> Rollout:
        """Samples and scores the responses of one update; each process does its share, and all get the whole batch."""
        config = self.config
        is_decoder = not self._policy.is_seq2seq
        share = self.runtime.share
        texts = share(self._prompt_batches.of_update(update))
        group = share(torch.arange(config.batch_size) // config.samples_per_prompt)
        uniforms = share(sampling_uniforms(config.seed, update, config.batch_size, config.max_new_tokens))
        prompts = prompt_batch(texts, self.tokenizer, self.runtime.device, left=is_decoder)
        sampled = self.sampler.sample(prompts, uniforms)
        completions = complete(prompts, sampled, self.tokenizer, continues=is_decoder, group=group)
        scores = member_scores(self.scorer, completions.prompts, completions.responses)
        shaped_scores = self._shaping.shaped(scores, completions.finished, self.runtime)
        release_freed_memory()  # the sampler's cache left holes
        own_rollout = collect(
            completions,
            self._policy,
            self._reference,
            scores,
            shaped_scores,
            temperature=config.temperature,
            kl_penalty=config.kl_penalty,
            critic=self.learner.critic,
            states=sampled.states,
            recompute=config.recomputes_logprobs,
            max_rows=config.forward_batch_size,
        )
        rollouts = self.runtime.gather(to_device(own_rollout, torch.device("cpu")))  # processes may differ in device
        return to_device(concatenate(rollouts, left=is_decoder), self.runtime.device)

    def generate(self, prompts: Sequence[str], *, seed: int = 0, reference: bool = False) -> list[str]:
        """Samples one response to each prompt, from the policy as it is now or from the `reference` it started as."""
        options: dict[str, Any] = {
            "max_new_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "seed": seed,
        }
        if reference:
            with self._reference.model() as frozen:
                return generate_text(frozen, self.tokenizer, list(prompts), **options)
        return generate_text(self._policy, self.tokenizer, list(prompts), **options)

    def save(self, folder: str | Path) -> None:
        """Writes policy and tokenizer as a plain transformers folder, and compares the saved weights with the policy's.

        Raises ResourceError if they cannot be written; an earlier model in `folder` stays as it was.
        """
        if self.runtime.is_main:
            save_model(self.policy, self.tokenizer, folder)

    def checkpoint(self) -> None:
        """Writes `<output_dir>/checkpoints/step-<updates done>`; does nothing without an output_dir.

        Raises CheckpointError if it cannot be written and NotFiniteError for a weight that is not finite; earlier
        checkpoints stay intact.
        """
        if self.config.output_dir is None:
            return
        self._check_weights()
        random = self.runtime.gather(random_states())  # a reward function may draw differently in each process
        state = {
            **self._trained_state(),
            "best_score": self._best_score,
            "bad_batches": (self.bad_batches, self.bad_in_a_row),
            "random": random,
        }
        self._checkpoints.save(len(self.history), state)

    def snapshot(self) -> dict[str, Any]:
        """A copy of everything that learning changes, for `restore`: policy, learner, KL coefficient, score statistics.

        `save_checkpoint` accepts it. History and random states are not part of it. Raises NotFiniteError for a weight
        that is not finite.
        """
        self._check_weights()
        return copied(self._trained_state())

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `snapshot` returned; the state is copied and can be restored again."""
        load_tensors(self._policy, state["policy"])
        self.learner.load_state(copied(state["learner"]))  # the optimiser changes the tensors it is given
        self.kl_coef = state["kl_coef"]
        self._shaping.moments = state["score_moments"]

    def _check_weights(self) -> None:
        """Raises NotFiniteError for a weight of policy or critic that is NaN or infinite."""
        advice = f"After update {len(self.history)} nothing is saved, start again with a lower learning rate"
        check_finite(self._policy, advice)
        if self.learner.critic is not None:
            check_finite(self.learner.critic, advice)

    def _trained_state(self) -> dict[str, Any]:
        return {
            "policy": trainable_tensors(self._policy),
            "learner": self.learner.state(),
            "kl_coef": self.kl_coef,
            "score_moments": self._shaping.moments,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.restore(state)
        self._best_score = state["best_score"]
        self.bad_batches, self.bad_in_a_row = state["bad_batches"]
        self.history = [row["metrics"] for row in self.logged]
        set_random_states(state["random"][self.runtime.rank % len(state["random"])])

    def _adapt_kl_coef(self, kl: float) -> None:
        config = self.config
        self.kl_coef = adapted_kl_coef(
            self.kl_coef, kl, target=config.target, horizon=config.horizon, samples=config.batch_size
        )

    def _set_aside(self, rollout: Rollout, update: int, reason: str) -> None:
        """Counts a bad batch and writes it to a file. Raises RewardError after too many in a row."""
        self.bad_batches += 1
        self.bad_in_a_row += 1
        logger.warning("Update %d ends at its first number that is not finite: %s.", update + 1, reason)
        if self.config.output_dir is not None and self.runtime.is_main:
            path = self._folder / "bad_batches" / f"step-{update + 1}.json"
            set_aside(path, rollout, step=update + 1, reason=reason)
        if self.bad_in_a_row >= min(self.config.max_bad_batches, self.updates):
            newest = self._checkpoints.newest
            good = f"add --resume to continue from '{newest}', the last good checkpoint" if newest else "start again"
            raise RewardError(
                f"{self.bad_in_a_row} batches in a row could not be learned from, the last because {reason}: correct"
                f" the reward and {good}, or start again with a lower learning rate."
            )

    def _push_if_best(self, score: float, update: int) -> None:
        """Saves and pushes the policy that sampled this batch, before it learns, if its score is the best so far."""
        options = self.config.push_to_hub_if_best_kwargs
        if not options or (update + 1) % self.config.compare_steps or score <= self._best_score:
            return
        self._best_score = score
        self.save(self._folder / "best")
        if self.runtime.is_main:
            push_folder(self._folder / "best", **options)

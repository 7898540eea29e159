"""The loop that every algorithm which samples while it learns shares: sample, score, learn, measure, checkpoint.

What an algorithm does with a batch is its `Learner`, one file each. A batch depends on nothing but the seed, the number
of the update and the policy, so a run that goes on from a checkpoint is the run that was never stopped. An update that
meets a NaN or an infinity ends there, and its batch is set aside.
"""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deep_rlhf.accel.cpu.allocator import kept_memory, release_freed_memory
from deep_rlhf.algorithms.online import build as setup
from deep_rlhf.algorithms.online.config import FREE_TO_CHANGE, OnlineConfig
from deep_rlhf.algorithms.online.optimiser_step import Learner, NotFiniteError
from deep_rlhf.algorithms.online.score_shaping import ScoreShaping, rollout_metrics, rollout_problem
from deep_rlhf.errors import UserError
from deep_rlhf.models.policy import Policy
from deep_rlhf.ops.kl import adapted_kl_coef
from deep_rlhf.rollout.collect import collect, complete, needs_states, prompt_batch
from deep_rlhf.rollout.engine import Engine
from deep_rlhf.rollout.generate import eos_token_ids, generate_text
from deep_rlhf.rollout.records import concatenate, moved
from deep_rlhf.rollout.sampler import sampling_uniforms
from deep_rlhf.runtime.checkpoint import (
    changed_flags,
    latest_checkpoint,
    random_states,
    remove_checkpoints,
    save_checkpoint,
    set_random_states,
)
from deep_rlhf.runtime.hub import push_folder
from deep_rlhf.runtime.processes import Runtime
from deep_rlhf.types import Rollout, Scorer

logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """One Ctrl-C: the update that was running is done, and a checkpoint written."""


class OnlineTrainer:
    """Trains a policy so that its responses to `prompts` score high while it stays near where it started."""

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

        `reward` is a Scorer, a function of (prompts, responses) that returns one number each, or what the flag
        `--reward_model` takes. With `config.output_dir` checkpoints are written there, and with `config.resume` the
        newest one is where this trainer goes on. Raises UserError if something cannot be opened, no prompt can be
        used, or the run to be continued was another one.
        """
        set_seed(config.seed)
        self.config = config
        self.runtime: Runtime = setup.open_runtime(config)
        model, self.tokenizer = setup.model_and_tokenizer(model, tokenizer, config)
        self._policy: Policy = setup.open_policy(model, self.runtime.device, config)
        self._reference = setup.open_reference(self._policy, config)
        self.scorer = setup.open_scorer(reward, self.runtime.device, config)
        longest = setup.longest_prompt(self._policy.language_model, config)
        self.prompts, self.prompt_report = setup.usable_prompts(prompts, self.tokenizer, longest)
        self.updates = setup.count_updates(len(self.prompts), config)
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
        self._bad_batches = self._bad_in_a_row = 0
        self._interrupted = False
        self._identity = setup.run_identity(
            config,
            self.prompts,
            self._reference,
            self.scorer,
            updates=self.updates,
            processes=self.runtime.processes,
            without=FREE_TO_CHANGE,
        )
        self._find_earlier_run()

    @property
    def policy(self) -> PreTrainedModel:
        """The tuned model as plain transformers knows it (adapters merged into a copy)."""
        return self._policy.plain_model()

    def train(
        self, on_update: Callable[[dict[str, float]], None] | None = None, *, updates: int | None = None
    ) -> list[dict[str, float]]:
        """Runs the next `updates` updates (default: all that are left) and returns `history`, a dict of metrics each.

        `on_update` may add to each dict. Between two calls `scorer` may be replaced, by one refitted to new answers.
        After Ctrl-C the update that is running is ended, a checkpoint written and Stopped raised; a second Ctrl-C
        raises KeyboardInterrupt at once. Raises UserError when `max_bad_batches` in a row ended so.
        """
        done = len(self.history)
        end = self.updates if updates is None else min(self.updates, done + updates)
        self.runtime.start_trackers(
            self.config.tracker_project_name or "deep-rlhf", dataclasses.asdict(self.config), self.config.tracker_kwargs
        )
        bar = tqdm(
            range(done, end),
            desc=self.config.exp_name,
            unit="update",
            initial=done,
            total=end,
            disable=not self.runtime.is_main,
        )
        with self._ctrl_c_waits(), kept_memory():
            for update in bar:
                metrics = self.step(update)
                bar.set_postfix(score=f"{metrics['score_mean']:.3f}", kl=f"{metrics['kl']:.2f}")
                if on_update is not None:
                    on_update(metrics)
                self.history.append(metrics)
                self.runtime.log(metrics, update + 1)
                interrupted = self.runtime.any(self._interrupted)
                # none between bad batches: if they go on, the newest checkpoint is from before they began
                due = (update + 1) % self.config.save_freq == 0 and not self._bad_in_a_row
                if interrupted or due or update + 1 == self.updates:
                    self.checkpoint()
                if interrupted:
                    raise Stopped
        if end == self.updates:
            self.runtime.finish()
        return self.history

    def step(self, update: int) -> dict[str, float]:
        """One update: sample, score, learn. Returns its metrics."""
        start = time.perf_counter()
        moments = self._shaping.moments
        rollout = self.last_rollout = self._shaping.shaped(self._collect(update))
        sampled = time.perf_counter()
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
            self._bad_in_a_row = 0
            if self.config.adapts_kl_coef(update):
                self._adapt_kl_coef(float(torch.where(rollout.response_mask, rollout.kl, 0.0).sum(1).mean()))
        seconds = time.perf_counter() - start
        metrics["bad_batches"] = float(self._bad_batches)
        metrics["tokens_per_second"] = float(rollout.response_mask.sum()) / seconds
        metrics["sampling_share_of_time"] = (sampled - start) / seconds
        metrics["memory_gb"] = self.runtime.peak_memory_gb()
        return metrics

    def generate(self, prompts: Sequence[str], *, seed: int = 0, reference: bool = False) -> list[str]:
        """One response to each prompt, of the policy as it is now or of the `reference` it started as."""
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
        """Writes the policy and tokenizer as a plain transformers folder and opens it again to be sure it is whole."""
        if self.runtime.is_main:
            trusted = self.config.trust_remote_code
            setup.save_policy(self.policy, self.tokenizer, folder, trust_remote_code=trusted)

    def checkpoint(self) -> None:
        """Writes `<output_dir>/checkpoints/step-<updates done>`; nothing without an output_dir.

        Raises UserError when the disk refuses it; the earlier checkpoints are intact.
        """
        if self.config.output_dir is None:
            return
        random = self.runtime.gather(random_states())  # a reward function may draw differently in each process
        if self.runtime.is_main:
            state = {
                "identity": self._identity,
                "updates": self.updates,
                **self._learned(),
                "best_score": self._best_score,
                "bad_batches": (self._bad_batches, self._bad_in_a_row),
                "history": self.history,
                "random": random,
            }
            save_checkpoint(self._checkpoints, len(self.history), state)
        self.runtime.wait()

    def snapshot(self) -> dict[str, Any]:
        """A copy of all that learning has changed, for `restore`: policy, learner, KL coefficient, score statistics.

        It is what `save_checkpoint` takes. The history and the random states go on, whatever is restored.
        """
        return setup.copied(self._learned())

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what `snapshot` returned; the state stays the caller's, and can be restored again."""
        setup.load_tensors(self._policy, state["policy"])
        self.learner.load_state(setup.copied(state["learner"]))  # Adam goes on in what it is given
        self.kl_coef = state["kl_coef"]
        self._shaping.moments = state["score_moments"]

    def _learned(self) -> dict[str, Any]:
        return {
            "policy": setup.trainable_tensors(self._policy),
            "learner": self.learner.state(),
            "kl_coef": self.kl_coef,
            "score_moments": self._shaping.moments,
        }

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output_dir or ".") / "checkpoints"

    def _find_earlier_run(self) -> None:
        """Goes on from the newest checkpoint in output_dir, if asked to; never walks over an unfinished run."""
        if self.config.output_dir is None:
            return
        found = latest_checkpoint(self._checkpoints)
        if not self.config.resume:
            if found is not None and found.step < found.state["updates"]:
                raise UserError(
                    f"'{self.config.output_dir}' holds a run that stopped after {found.step} of"
                    f" {found.state['updates']} updates: add --resume to go on with it, give another output_dir, or"
                    f" remove '{self._checkpoints}'."
                )
            if self.runtime.is_main:
                remove_checkpoints(self._checkpoints)
            return
        if found is None:
            logger.info("There is no whole checkpoint in '%s': starting from the beginning.", self._checkpoints)
            return
        changed = changed_flags(found.state["identity"], self._identity, free=())
        if changed:
            raise UserError(f"This is not the run in '{self.config.output_dir}': {changed}. Undo that, or start anew.")
        self._load(found.state)
        if found.step == self.updates:
            logger.info("All %d updates are done, says '%s'.", found.step, found.path)
        else:
            logger.info("Going on after update %d of %d, from '%s'.", found.step, self.updates, found.path)

    def _load(self, state: dict[str, Any]) -> None:
        self.restore(state)
        self._best_score = state["best_score"]
        self._bad_batches, self._bad_in_a_row = state["bad_batches"]
        self.history = state["history"]
        set_random_states(state["random"][self.runtime.rank % len(state["random"])])

    def _collect(self, update: int) -> Rollout:
        """Samples and scores the prompts of one update; each process does its share and gets everything."""
        config = self.config
        left = not self._policy.is_seq2seq
        share = self.runtime.share
        texts = share(self._batch_of_prompts(update))
        group = share(torch.arange(config.batch_size) // config.samples_per_prompt)
        uniforms = share(sampling_uniforms(config.seed, update, config.batch_size, config.max_new_tokens))
        prompts = prompt_batch(texts, self.tokenizer, self.runtime.device, left=left)
        sampled = self.sampler.sample(prompts, uniforms)
        completions = complete(prompts, sampled, self.tokenizer, continues=left, group=group)
        scores = self.scorer.score(completions.prompts, completions.responses)
        release_freed_memory()  # the sampler's cache left holes
        part = collect(
            completions,
            self._policy,
            self._reference,
            scores,
            temperature=config.temperature,
            kl_penalty=config.kl_penalty,
            critic=self.learner.critic,
            states=sampled.states,
            recompute=config.recomputes_logprobs,
            max_rows=config.forward_batch_size,
        )
        part = dataclasses.replace(part, shaped_scores=self._shaping.combined(scores).to(part.scores.device))
        parts = self.runtime.gather(moved(part, torch.device("cpu")))  # each process may have a device of its own
        return moved(concatenate(parts, left=left), self.runtime.device)

    def _batch_of_prompts(self, update: int) -> list[str]:
        """The prompts of an update: each pass over the data is a new permutation, and batches run across passes."""
        config, count = self.config, len(self.prompts)
        size = config.batch_size // config.samples_per_prompt
        batch = []
        for position in range(update * size, (update + 1) * size):
            epoch, offset = divmod(position, count)
            if offset == 0 or position == update * size:
                generator = torch.Generator().manual_seed(config.seed * 7_919 + epoch)
                order = torch.randperm(count, generator=generator).tolist()
            batch += [self.prompts[order[offset]]] * config.samples_per_prompt
        return batch

    def _adapt_kl_coef(self, kl: float) -> None:
        config = self.config
        self.kl_coef = adapted_kl_coef(
            self.kl_coef, kl, target=config.target, horizon=config.horizon, samples=config.batch_size
        )

    def _set_aside(self, rollout: Rollout, update: int, reason: str) -> None:
        """Keeps a batch that ended its update, for people to look at. Raises UserError after too many in a row."""
        self._bad_batches += 1
        self._bad_in_a_row += 1
        logger.warning("Update %d ends at its first number that is not finite: %s.", update + 1, reason)
        if self.config.output_dir is not None and self.runtime.is_main:
            path = Path(self.config.output_dir) / "bad_batches" / f"step-{update + 1}.json"
            setup.set_aside(path, rollout, step=update + 1, reason=reason)
        if self._bad_in_a_row >= min(self.config.max_bad_batches, self.updates):
            found = latest_checkpoint(self._checkpoints) if self.config.output_dir is not None else None
            good = f"go on with --resume from '{found.path}', the last good checkpoint" if found else "begin again"
            raise UserError(
                f"{self._bad_in_a_row} batches in a row could not be learned from, the last because {reason}: mend the"
                f" reward and {good}, or begin again with a lower learning rate."
            )

    def _push_if_best(self, score: float, update: int) -> None:
        """Saves and pushes the policy that sampled, before it learns, if nothing scored as high yet."""
        options = self.config.push_to_hub_if_best_kwargs
        if not options or (update + 1) % self.config.compare_steps or score <= self._best_score:
            return
        self._best_score = score
        folder = Path(self.config.output_dir or f"outputs/{self.config.exp_name}") / "best"
        self.save(folder)
        if self.runtime.is_main:
            push_folder(folder, **options)

    @contextmanager
    def _ctrl_c_waits(self) -> Iterator[None]:
        """The first Ctrl-C only asks to stop; the second one interrupts."""

        def ask_to_stop(*_: Any) -> None:
            self._interrupted = True
            logger.warning("Stopping after this update; press Ctrl-C again to stop at once.")
            signal.signal(signal.SIGINT, before)

        self._interrupted = False
        before = signal.getsignal(signal.SIGINT)
        if before in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
            yield  # signals are somebody else's, or Ctrl-C is for other programs of the terminal
            return
        signal.signal(signal.SIGINT, ask_to_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
